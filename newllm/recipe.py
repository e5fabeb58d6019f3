"""Recipes: TOML files of options, for runs that are worth repeating. `newllm train --config NAME`.

    [data]        data, text_field, tokenizer, vocab_size
    [model]       preset, and fields of newllm.config.ModelConfig
    [training]    fields of newllm.training_config.TrainingConfig

NAME is a path, or one of those in newllm/recipes. Options of the command line come before what the file says.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from newllm.cli.parser import MODEL_OPTIONS, TRAINING_OPTIONS
from newllm.errors import UserError, os_reason, typed_path

BUILT_IN = Path(__file__).parent / "recipes"
SECTIONS = {
    "data": {"data", "text_field", "tokenizer", "vocab_size"},
    "model": {"preset"} | {field for _, field, _, _ in MODEL_OPTIONS},
    "training": {field for _, field, _, _ in TRAINING_OPTIONS},
}
TEXTS = {"preset", "data", "text_field", "tokenizer"}  # what no config checks


def recipe_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read_recipe(name: str) -> dict[str, object]:
    """The options of a recipe by field. Raises UserError naming the file and the key that is no option."""
    path = typed_path(name)
    if not path.exists() and name in recipe_names():
        path = BUILT_IN / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--config {name}: no such file, nor one of the recipes {', '.join(recipe_names())}") from error
    except OSError as error:
        raise UserError(f"--config {name}: cannot be read ({os_reason(error)})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {name}: not valid TOML ({error})") from error
    options: dict[str, object] = {}
    for section, values in content.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise UserError(f"--config {name}: {section!r} is none of the sections {', '.join(SECTIONS)}")
        for key, value in values.items():
            if key not in SECTIONS[section]:
                raise UserError(f"--config {name}: [{section}] has no setting {key!r}")
            if key in TEXTS and not isinstance(value, str):
                raise UserError(f"--config {name}: {key} is {value!r}, wanted a text")
            if key == "vocab_size" and (not isinstance(value, int) or isinstance(value, bool)):
                raise UserError(f"--config {name}: vocab_size is {value!r}, wanted an integer")
            options[key] = value
    return options


def apply_recipe(args: argparse.Namespace) -> None:
    """Put the recipe's options where the command line gave none. A model typed without recall, or of an architecture of
    its own, takes nothing of the recipe's recall."""
    if args.config is None:
        return
    recipe = read_recipe(args.config)
    of_its_own = getattr(args, "architecture", None) not in (None, recipe.get("architecture", "newllm"))
    if of_its_own or getattr(args, "recall", None) == 0:
        recipe.pop("recall", None)
        recipe.pop("recall_dropout", None)
    for field, value in recipe.items():
        if not hasattr(args, field):
            setattr(args, field, value)
