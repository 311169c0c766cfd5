"""manifest.csv: what made each file of a folder."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from utils.cli import UserError
from utils.files import crc32, fcntl, write_csv


class Manifest:
    """manifest.csv in a folder: one row for each file, with the settings that made it.

    Processes append rows when files are done, so its cost does not grow with the rows that are
    there. A file counts as done if its row's settings and checksum (CRC-32) hold.
    settings: column -> value, the same for all files of the folder.
    columns: further columns, of a single file.

    Makes the folder. Raises UserError for one with other files or of other settings, or that cannot
    be opened.
    """

    def __init__(self, folder: Path, settings: dict, columns: tuple[str, ...]):
        self.folder, self.path = folder, folder / "manifest.csv"
        self.settings = {name: cell(value) for name, value in settings.items()}
        self.columns = ("file", "crc32", *columns, *settings)
        self.rows: dict[str, dict[str, str]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in sorted(folder.iterdir())
                      if not path.name.startswith(".")]
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"{folder}: cannot be opened ({reason}); give another folder") from None
        if text is None and others:
            raise UserError(f"{folder}: holds other files ({others[0]}) and no manifest.csv; give "
                            "an empty or a new folder")
        # A line without an end was cut off while it was written.
        self._read([line for line in (text or "").splitlines(keepends=True) if line[-1] == "\n"])

    def _read(self, lines: list[str]) -> None:
        reader = csv.DictReader(lines)
        if lines and tuple(reader.fieldnames or ()) != self.columns:
            raise UserError(f"{self.path}: has other columns than this version writes; give "
                            "another folder")
        for row in reader:
            for name, value in self.settings.items():
                if row[name] != value:
                    raise UserError(f"{self.path}: its files have {name} = {row[name] or 'none'}, "
                                    f"now {value or 'none'}; give another folder, or the same "
                                    "options to go on")
            self.rows[row["file"]] = row

    def is_done(self, name: str, values: dict) -> bool:
        """Whether the file is there and whole. Raises UserError if its row has other values."""
        row, path = self.rows.get(name), self.folder / name
        for column, value in values.items() if row else ():
            if row[column] != cell(value):
                raise UserError(f"{self.path}: {name} has {column} = {row[column] or 'none'}, now "
                                f"{cell(value) or 'none'}; give another folder")
        if row is None and path.exists():
            raise UserError(f"{path}: is not in manifest.csv; give another folder, or remove it")
        return row is not None and path.exists() and crc32(path) == row["crc32"]

    def start(self, redo: Iterable[str]) -> None:
        """Writes the header and the rows of all files but those that will be written again."""
        redo = set(redo)
        self.rows = {name: row for name, row in self.rows.items() if name not in redo}
        write_csv(self.path, self.columns, self.rows.values())

    def append(self, rows: list[dict]) -> None:
        """Adds rows of finished files: "file" and the further columns. Raises UserError."""
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        for row in rows:
            values = {"crc32": crc32(self.folder / row["file"])} | row
            writer.writerow({name: cell(value) for name, value in values.items()} | self.settings)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(table.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space "
                            "and run the same command again") from None


def cell(value) -> str:
    """A value as the manifest has it; None is empty."""
    return "" if value is None else str(value)
