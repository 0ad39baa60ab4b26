"""What a run tells about itself: readings, console lines, files, trackers, pictures, traces."""
