"""Seven emoji sets that people drew become one student (docs/emoji.md).

    python -m dmm_jax.studies.emoji fetch emoji                      # the packages, by npm, and the pictures
    python -m dmm_jax.studies.emoji counts emoji                     # how many concepts each set has and lacks
    python -m dmm_jax.studies.emoji run emoji --size ship --minutes 10
    python -m dmm_jax.studies.emoji status emoji --size ship
    python -m dmm_jax.studies.emoji sheet emoji --size ship          # pictures of what is done, side by side
    python -m dmm_jax.studies.emoji contact emoji --size ship        # 200 pictures of a student beside people's
    python -m dmm_jax.studies.emoji table emoji --size ship          # of what is measured
    python -m dmm_jax.studies.emoji package emoji --rows joint --seeds 0 --out dmm_jax/world/checkpoints   # `emoji`

`--rows` and `--seeds` choose students; without them `run` trains every row with three seeds.

`run` is given again until it prints that all is done: each call continues where the last one ended. It needs no
network: on a machine without one, copy emoji/pictures there and begin with `run`.
"""

import argparse
import os
import pathlib
import sys

from dmm_jax.runtime import compilation
from dmm_jax.runtime.errors import UserError
from dmm_jax.studies import emoji_judge, emoji_package, emoji_pictures, emoji_sheet, emoji_stages
from dmm_jax.studies.emoji_merges import ROWS, SEEDS
from dmm_jax.studies.emoji_networks import SIZES
from dmm_jax.studies.emoji_sets import SETS
from dmm_jax.studies.emoji_study import Study


def main(arguments: list[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fetch", "counts", "run", "status", "sheet", "contact", "table", "package"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", choices=list(SIZES), default="ship")
    parser.add_argument("--minutes", type=float, default=10.0, help="`run` ends after this time (default 10)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="stages to run, as `status` names them")
    parser.add_argument("--lacking", choices=list(SETS), help="`counts` names the concepts that this set lacks instead")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=list(ROWS),
        help="students; `sheet`, `contact` and `package` take the first (default all)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of each student (default 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="students at the same time (default 1)")
    parser.add_argument("--out", type=pathlib.Path, help="`package` writes the folder emoji there")
    args = parser.parse_args(arguments)
    study, students = Study(args.folder, SIZES[args.size]), {"rows": args.rows, "seeds": args.seeds}
    try:
        if args.command == "fetch":
            emoji_pictures.fetch(args.folder)
        if args.command in ("fetch", "counts"):
            lacking = args.lacking and emoji_pictures.lacking(args.folder, args.lacking)
            print("\n".join(lacking) if args.lacking else emoji_pictures.counts(args.folder))
        elif args.command == "run":
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # The jobs share a GPU's memory.
            compilation.use_cache()
            done = emoji_stages.run(study, args.minutes, args.only, args.jobs, **students)
            print(emoji_stages.status(study, **students))
            print("\nAll is done." if done else "\nNot done: give it again.")
        elif args.command == "sheet":
            print(emoji_sheet.write_sheet(study, args.rows[0], args.seeds[0]))
        elif args.command == "contact":
            print(emoji_sheet.write_contact_sheet(study, args.rows[0], args.seeds[0]))
        elif args.command == "package":
            print(emoji_package.write_package(study, args.rows[0], args.seeds[0], args.out or study.out))
        elif args.command == "status":
            print(emoji_stages.status(study, **students))
        else:
            print(emoji_judge.table(*emoji_judge.read(study)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
