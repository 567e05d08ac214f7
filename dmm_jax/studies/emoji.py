"""Seven emoji sets that people drew become one student (docs/emoji.md).

    python -m dmm_jax.studies.emoji fetch emoji                      # the packages, by npm, and the pictures
    python -m dmm_jax.studies.emoji counts emoji                     # how many concepts each set has and lacks
    python -m dmm_jax.studies.emoji run emoji --size ship --minutes 10
    python -m dmm_jax.studies.emoji status emoji --size ship
    python -m dmm_jax.studies.emoji sheet emoji --size ship          # pictures of what is done, side by side
    python -m dmm_jax.studies.emoji table emoji --size ship          # once every stage is done

`run` is given again until it prints that all is done: each call continues where the last one ended. It needs no
network: on a machine without one, copy emoji/pictures there and begin with `run`.
"""

import argparse
import json
import pathlib
import sys

from dmm_jax.runtime import compilation
from dmm_jax.runtime.errors import UserError
from dmm_jax.studies import emoji_judge, emoji_pictures, emoji_sheet, emoji_stages
from dmm_jax.studies.emoji_networks import SIZES
from dmm_jax.studies.emoji_sets import SETS


def read_measures(study: emoji_stages.Study) -> dict:
    """Returns what the stage `measure` wrote.

    Raises:
      UserError: it is not done.
    """
    path = study.out / "measures.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: python -m dmm_jax.studies.emoji run {study.folder}")
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fetch", "counts", "run", "status", "sheet", "table"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", choices=list(SIZES), default="ship")
    parser.add_argument("--minutes", type=float, default=10.0, help="`run` ends after this time (default 10)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="stages to run, as `status` names them")
    parser.add_argument("--lacking", choices=list(SETS), help="`counts` names the concepts that this set lacks instead")
    args = parser.parse_args(arguments)
    study = emoji_stages.Study(args.folder, SIZES[args.size])
    try:
        if args.command == "fetch":
            emoji_pictures.fetch(args.folder)
        if args.command in ("fetch", "counts"):
            lacking = args.lacking and emoji_pictures.lacking(args.folder, args.lacking)
            print("\n".join(lacking) if args.lacking else emoji_pictures.counts(args.folder))
        elif args.command == "run":
            compilation.use_cache()
            done = emoji_stages.run(study, args.minutes, args.only)
            print(emoji_stages.status(study) + f"\n\n{'All is done.' if done else 'Not done: give it again.'}")
        elif args.command == "sheet":
            print(emoji_sheet.write_sheet(study))
        elif args.command == "status":
            print(emoji_stages.status(study))
        else:
            print(emoji_judge.table(read_measures(study)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
