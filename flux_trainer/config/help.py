"""The page that `--help` prints: every section, key, default, accepted value and meaning, from the schema."""

from __future__ import annotations

import textwrap
from typing import get_origin

from pydantic.fields import FieldInfo

from flux_trainer.config import toml
from flux_trainer.config.fields import describe, section_in
from flux_trainer.config.problems import ConfigError, unknown_key
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.section import Section

_WIDTH = 110
_COLUMN = 48

_FORMS = """\
Settings: defaults < TOML files < flags. In a file, --training.steps is the key `steps` of table [training].
  --job.config_file A.toml         a TOML file; repeat it, or write A.toml,B.toml, to layer several
  --training.steps 10              also --training.steps=10; dashes count as underscores: --training.img-size
  --checkpoint.enable              also --checkpoint.enable true; off: --checkpoint.no-enable
  --validation.prompts "cat,dog"   lists: by commas, repeated, or a TOML array: '["a cat, asleep", "a dog"]'
  --data.sources.0.path FOLDER     a key of the first [[data.sources]] table
  --lr_scheduler.total_steps none  unsets an optional key
  --help SECTION                   this page for one section
"""


def help_text(section: str = "") -> str:
    """The help page, for one section or for all of them."""
    if not section:
        parts = [_section(name, field) for name, field in JobConfig.model_fields.items()]
        return _FORMS + "\n" + "\n".join(parts)
    name = section.removeprefix("--").partition(".")[0].replace("-", "_")
    if name not in JobConfig.model_fields:
        raise ConfigError([unknown_key("--help", (name,))])
    return _section(name, JobConfig.model_fields[name])


def _section(name: str, field: FieldInfo) -> str:
    model = section_in(field.annotation)
    assert model is not None, name
    return "\n".join([f"[{name}]", *_keys(name, model)]) + "\n"


def _keys(prefix: str, model: type[Section]) -> list[str]:
    lines = []
    for key, field in model.model_fields.items():
        accepts = f"{describe(field.annotation, field.metadata)}; {_default(field)}"
        lines += _wrap(accepts, f"{f'  --{prefix}.{key}':{_COLUMN}}", " " * _COLUMN)
        lines += _wrap(field.description or "", " " * 8, " " * 8)
        inner = section_in(field.annotation)
        if inner is not None and get_origin(field.annotation) is list:
            lines += _keys(f"{prefix}.{key}.N", inner)
    return lines


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "default none" if default is None else f"default {toml.value(default)}"
