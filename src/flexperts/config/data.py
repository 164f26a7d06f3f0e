"""Settings of who has which rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from flexperts.config.names import normal
from flexperts.config.section import Section

GIVEN = "python:"
"""Begins the source of rows that a Python program gives, such as ``python:clinic/train``."""
_FIELDS = ("instruction", "context", "response", "category", "rejected", "messages", "text", "tools", "system")
_WHOLE = ("messages", "text")
"""Fields that are a whole row."""


def _of_fields(columns: dict[str, str]) -> dict[str, str]:
    if unknown := set(columns) - set(_FIELDS):
        raise ValueError(f"columns maps {sorted(unknown)}; fields are {', '.join(_FIELDS)}")
    columns_named = [column for column in columns.values() if column]
    if twice := sorted({c for c in columns_named if columns_named.count(c) > 1}):
        raise ValueError(f"columns maps two fields to {', '.join(map(repr, twice))}; each has a column of its own")
    if empty := [field for field in ("instruction", "response", *_WHOLE) if columns.get(field) == ""]:
        raise ValueError(f"columns maps {empty[0]} to nothing; it is required")
    for field in _WHOLE:
        others = {"instruction", "context", "response", "rejected", *_WHOLE} - {field}
        if field in columns and (also := sorted(others & columns.keys())):
            raise ValueError(f"columns maps {field} and {also[0]}; {field} is a whole row")
    return columns


OnBadRow = Literal["refuse", "drop"]
"""What happens to rows that cannot be used."""
DataFormat = Literal[
    "auto", "instruction", "alpaca", "dolly", "prompt_completion", "preference", "messages", "sharegpt", "text"
]
"""How rows are written in a file; auto recognises it by the columns."""
LossOn = Literal["all", "last"]
"""Which of a chat's answers are trained."""
Columns = Annotated[dict[str, str], AfterValidator(_of_fields)]
"""Field of a row -> column of a file; an empty name leaves an optional field empty."""


Template = Literal["auto", "chat", "alpaca"]
"""How rows become prompts; see model.template."""
_FILES = ("train", "test")


class SilosConfig(Section):
    """The example silos that come with flexperts, generated for the run."""

    seed: int = 0
    """Seed of the generator."""
    train_rows: int = Field(96, ge=4)
    """Train rows per silo."""
    test_rows: int = Field(40, ge=4)
    """Test rows per silo."""
    turns: Literal[1, 3] = 1
    """Questions in a row. 3 = a chat: two answers that are alike at every silo, then one in the silo's style."""


class ClientFiles(Section):
    """One client's own data, and what of its rows differs from the other clients'."""

    train: str | None = None
    """File (.jsonl, .json, .csv, .tsv, .parquet; see docs/data.md) or hub:org/name[:split]; required, except with
    data.folder, which has the files."""
    test: str | None = None
    """Test file; without it, test_fraction of the passages is held out."""
    columns: Columns | None = None
    """Its own mapping of fields to columns, in place of the whole of data.columns."""
    format: DataFormat | None = None
    """How its rows are written; without it, data.format."""
    on_bad_row: OnBadRow | None = None
    """What to do with its bad rows; without it, data.on_bad_row."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of its passages held out where it has no test file; without it, data.test_fraction."""
    template: Template | None = None
    """Its prompt template; without it, model.template."""

    @property
    def own(self) -> dict[str, Any]:
        """The settings that are this client's own, without its files."""
        return {name: value for name, value in self if name not in _FILES and value is not None}


class PartitionConfig(Section):
    """One pooled data set, divided over the clients; every row goes to exactly one of them."""

    source: str
    """File (.jsonl, .json, .csv, .tsv, .parquet; see docs/data.md) or hub:org/name[:split] with all rows."""
    test: str | None = None
    """Test file; without it, data.test_fraction of each client's passages is held out."""
    by: Literal["pathological", "dirichlet", "natural", "iid"]
    """pathological = a few categories per client; dirichlet = a Dirichlet draw per category; natural = by a column
    of client ids; iid = at random."""
    clients: int | None = Field(None, ge=1)
    """Number of clients; not with natural, where the column's values are the clients."""
    column: str = Field("category", min_length=1)
    """Column by whose values rows are divided: the field category, or any column of the source (not with iid)."""
    categories_per_client: int = Field(1, ge=1)
    """Number of categories of each client (pathological)."""
    alpha: float = Field(0.5, gt=0)
    """Concentration (dirichlet): the smaller, the more the clients differ."""
    min_rows: int = Field(8, ge=1)
    """Fewest rows that a client may get, counted before test rows are held out."""

    @model_validator(mode="after")
    def _applying(self) -> Self:
        if idle := sorted(self._idle() & self.model_fields_set):
            raise ValueError(f"{', '.join(idle)} does not apply to by = {self.by!r}; leave it out")
        if self.clients is None and self.by != "natural":
            raise ValueError(f"by = {self.by!r} needs clients, the number of them")
        return self

    @model_serializer(mode="wrap")
    def _without_idle(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved run must be readable again, and settings that do not apply are refused when given."""
        return {name: value for name, value in write(self).items() if name not in self._idle()}

    def _idle(self) -> set[str]:
        """Settings that mean nothing for this ``by``."""
        used = {
            "pathological": {"clients", "column", "categories_per_client"},
            "dirichlet": {"clients", "column", "alpha"},
            "natural": {"column"},
            "iid": {"clients"},
        }
        return set().union(*used.values()) - used[self.by]


class DataConfig(Section):
    """Who has which rows: exactly one of silos, folder, clients, partition, at_silos."""

    silos: SilosConfig | None = None
    """The example silos that come with flexperts."""
    folder: str | None = None
    """A folder with one sub-folder per client that holds a file `train.*` and maybe `test.*`, of any kind."""
    clients: dict[str, ClientFiles] = Field(default_factory=dict)
    """Client name -> its files, and its own settings; with data.folder, the settings alone."""
    partition: PartitionConfig | None = None
    """One pooled data set, divided over clients."""
    at_silos: bool = False
    """Every silo reads its own rows: a deployed run, whose recipe names no path."""
    leave_out: tuple[str, ...] | None = None
    """Names of clients that do not take part, such as those that join the finished run; their rows are not used."""
    columns: Columns = Field(default_factory=dict)
    """Field (instruction, context, response, category, rejected; messages, tools, system; text) -> its column."""
    format: DataFormat = "auto"
    """How rows are written; auto recognises it by the columns (see docs/data.md)."""
    loss_on: LossOn = "all"
    """all = every answer of a chat is trained; last = only the last one."""
    on_bad_row: OnBadRow = "refuse"
    """What to do with bad rows: refuse = stop and name all of them; drop = leave them out and say which."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of passages held out where a client has no test file."""
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of each client's train passages that is held out to choose settings: neither trained on nor tested."""
    validation_rows: int | None = Field(None, ge=1)
    """The same as a number of rows: passages are held out until they have so many. At most half of the rows."""

    def held_out(self) -> dict[str, Any]:
        """Return what stays the run's where the source of rows does not: rows to hold out, answers to train."""
        kept = ("test_fraction", "validation_fraction", "validation_rows", "loss_on")
        return {name: getattr(self, name) for name in kept}

    def of_client(self, name: str) -> DataConfig:
        """Return these settings as they hold for one client: its own in place of the common ones."""
        own = self.own_of(name)
        changed = {key: value for key, value in own.items() if key in DataConfig.model_fields}
        return self.model_copy(update=changed) if changed else self

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return all settings that hold for one client's rows, by the names that they have in ``ClientFiles``."""
        its = self.of_client(name)
        common = {key: getattr(its, key) for key in ClientFiles.model_fields if key in DataConfig.model_fields}
        return common | self.own_of(name)

    def own_of(self, name: str) -> dict[str, Any]:
        """Return the settings that one client has of its own, without its files."""
        found = self.clients.get(name)
        if found is None:
            found = next((its for key, its in self.clients.items() if normal(key) == normal(name)), ClientFiles())
        return found.own

    @model_validator(mode="after")
    def _files_of_clients(self) -> Self:
        for name, files in self.clients.items():
            if self.folder and not (files.train is files.test is None):
                raise ValueError(f"clients.{name}: data.folder has the files; give only settings such as columns")
            if not self.folder and files.train is None:
                raise ValueError(f"clients.{name}.train: it is required, unless data.folder has the files")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = ("silos", "folder", "clients", "partition", "at_silos")
        given = [n for n in sources if getattr(self, n) and not (n == "clients" and self.folder)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)} (now: {', '.join(given) or 'none'})")
        if self.validation_fraction and self.validation_rows:
            raise ValueError("validation_fraction and validation_rows exclude each other; give one of them")
        if self.at_silos and self.leave_out:
            raise ValueError("with at_silos, leave_out has no effect: do not connect the silos that are left out")
        return self
