"""`python -m flux_trainer COMMAND`: the same as the console script `flux-trainer`."""

import sys

from flux_trainer.cli.main import main

sys.exit(main())
