"""manifest.csv: what made each file of a folder."""

import csv
from pathlib import Path

from utils.cli import UserError
from utils.files import append_csv, crc32, locked, write_csv


class Manifest:
    """manifest.csv in a folder: one row for each file, with the settings that made it.

    `start` notes the files to come, processes `append` their rows when they are written, and
    `finish` leaves one row of each. A file counts as done if its row's settings and checksum
    (CRC-32) hold; whatever was interrupted, the files to come and those that are done are known.
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
                      if not path.name.startswith(".") and path != self.path]
        except OSError as error:
            raise UserError(f"{folder}: cannot be opened ({error.strerror}); give another folder"
                            ) from None
        self._read()
        if not self.rows and others:
            raise UserError(f"{folder}: holds other files ({others[0]}) and no manifest.csv that "
                            "lists them; give an empty or a new folder")

    def _read(self) -> None:
        """Reads the rows, of each file the last one."""
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            # A line without an end was cut off while it was written.
            lines = [line for line in text.splitlines(keepends=True) if line[-1] == "\n"]
            reader = csv.DictReader(lines)
            columns, rows = tuple(reader.fieldnames or ()), list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); give another folder"
                            ) from None
        if lines and columns != self.columns:
            raise UserError(f"{self.path}: has other columns than this version writes; give "
                            "another folder")
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{self.path}: the row of {row['file']} is damaged; remove it, or "
                                "give another folder")
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
        if path.exists() and (row is None or not path.is_file()):
            raise UserError(f"{path}: is no file of manifest.csv; give another folder, or remove "
                            "it")
        return row is not None and path.exists() and crc32(path) == row["crc32"]

    def start(self, todo: dict[str, dict]) -> None:
        """Notes the files that will be written, with the values of `is_done`."""
        for name, values in todo.items():
            self.rows[name] = {"file": name} | values | self.settings
        write_csv(self.path, self.columns, self.rows.values())

    def append(self, rows: list[dict]) -> None:
        """Adds rows of finished files: "file" and the further columns. Raises UserError."""
        rows = [{"crc32": crc32(self.folder / row["file"])} | row | self.settings for row in rows]
        with locked(self.folder / ".lock"):
            append_csv(self.path, self.columns, rows)

    def finish(self) -> None:
        """Leaves the last row of each file, once all processes have appended theirs."""
        self._read()
        write_csv(self.path, self.columns, self.rows.values())
        (self.folder / ".lock").unlink(missing_ok=True)


def cell(value) -> str:
    """A value as the manifest has it; None is empty."""
    return "" if value is None else str(value)
