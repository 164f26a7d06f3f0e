"""Settings of one silo: what a client's machine adds to a recipe that it receives."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from flexperts.config.data import ClientFiles, Columns, DataFormat, OnBadRow, Template
from flexperts.config.names import client_name
from flexperts.config.section import Section
from flexperts.errors import DataError


def _name(text: str) -> str:
    try:
        return client_name(text)
    except DataError as error:
        raise PydanticCustomError("name", "{rule}", {"rule": error.rule}) from error


class SiloData(ClientFiles):
    """The silo's own rows. Columns and bad rows are never the recipe's to decide."""

    train: str
    """File (.jsonl, .json, .csv, .tsv, .parquet; see docs/data.md) or hub:org/name[:split]."""
    columns: Columns = Field(default_factory=dict)
    """Field (instruction, context, response, category, rejected; messages, tools, system; text) -> its column."""
    format: DataFormat = "auto"
    """How rows are written; auto recognises it by the columns (see docs/data.md)."""
    on_bad_row: OnBadRow = "refuse"
    """What to do with bad rows: refuse = stop and name all of them; drop = leave them out and say which."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of passages held out where there is no test file; without it, the recipe's."""
    template: Template | None = None
    """Prompt template; without it, the recipe's model.template."""


class SiloSocket(Section):
    """A socket for a SuperNode that runs as another user; without it, the socket is in the state folder."""

    path: str
    """The socket, alone in its folder; the worker makes the folder, or checks that no one else can write to it."""
    group: Annotated[str, Field(min_length=1)]
    """Group that owns the socket; its members can open it."""
    users: Annotated[list[str], Field(min_length=1)]
    """Users (names or numbers) whose processes get answers; all others are refused, members of the group too."""


Identity = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""An Ed25519 public key in hex."""


class SiloPolicy(Section):
    """What the silo allows, whatever a server asks. Its worker refuses the rest, and tells the server the rule."""

    methods: tuple[str, ...] | None = Field(None, min_length=1)
    """Methods that a run may use; without it, all."""
    bases: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the base that a recipe may give; without it, any. The base itself is always the silo's own."""
    max_runs: int | None = Field(None, ge=0)
    """Most runs that the silo takes part in, forgotten ones included; without it, any number."""
    max_rounds: int = Field(1000, ge=1)
    """Most rounds of a run, a method's extra rounds included."""
    max_evaluations: int | None = Field(None, ge=1)
    """Most evaluations in a run; without it, any number."""
    noise: Literal["none", "local"] = "none"
    """local = a run must have privacy.noise = "local"; none = it need not."""
    min_noise_multiplier: float | None = Field(None, gt=0)
    """Least privacy.noise_multiplier; needs noise = "local"."""
    aggregation: Literal["plain", "secure"] = "plain"
    """secure = a run must have privacy.aggregation = "secure"; plain = it need not."""
    agreement: bool = False
    """Whether a run with secure aggregation must have privacy.agreement = true."""
    max_epsilon: float | None = Field(None, gt=0)
    """Budget: most epsilon that the updates of all runs together may spend; needs noise = "local"."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The delta at which the silo counts epsilon."""
    scores: bool = True
    """Whether evaluations are answered. A round's mean train loss is sent either way, unless noise is local
    or training.local_seconds is set."""
    min_score_rows: int = Field(5, ge=1)
    """Fewest rows behind a score, behind the difference between two scores, and behind a round's train loss."""
    min_clients: int | None = Field(None, ge=1)
    """Least federation.min_clients; without it, any."""
    max_message_bytes: int = Field(2**30, ge=2**20)
    """Size of the largest request that is read; raise it for runs whose shared weights are larger."""

    @model_validator(mode="after")
    def _noise_is_required(self) -> Self:
        for key in ("min_noise_multiplier", "max_epsilon"):
            if getattr(self, key) is not None and self.noise != "local":
                raise ValueError(f"policy.{key} needs policy.noise = 'local'")
        return self


class SiloConfig(Section):
    """One silo. Only the name is ever sent."""

    name: Annotated[str, AfterValidator(_name)]
    """The client's name in every run: letters of one script, digits, "-", "_", "."; it begins with no "."."""
    state: str
    """Folder of the private state of every run; only its owner may enter it."""
    base: str
    """The recipe's base on this machine: a shipped base's name, a local transformers folder, or a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage type of the base at start; a recipe with the other type makes the silo load the base again."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How its routed experts are stored at start; a recipe that differs makes the silo load the base again."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda, cuda:1, ..."""
    trust_remote_code: bool = False
    """Let the base's own Python code run; no recipe can switch it on."""
    data: SiloData
    socket: SiloSocket | None = None
    """Socket for a SuperNode that runs as another user; see docs/deploy.md."""
    policy: SiloPolicy = SiloPolicy()
    metrics: Annotated[str, Field(pattern=r"\.prom$")] | None = None
    """File for Prometheus, written after each request; its name ends in .prom (see docs/operating.md)."""
    roster: dict[str, Identity] = Field(default_factory=dict)
    """Silo -> its identity, as its `flexperts silo check` prints it; secure aggregation is then with these alone.
    Without a roster, each silo is known in a run as it is first seen."""
