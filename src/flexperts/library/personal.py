"""One client's model in use: chat, batches of answers, a folder, the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from flexperts.config.names import normal
from flexperts.data.prompts import PromptEncoder
from flexperts.errors import ConfigError, DataError
from flexperts.evaluation.generation import Answer
from flexperts.export.hub import fetched, folder_name, leaving, push
from flexperts.export.opened import ExportedFolder
from flexperts.library.homes import Home
from flexperts.terminal.console import console

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""An instruction, a row with ``instruction`` and maybe ``context``, or the turns of a conversation."""


class PersonalModel:
    """One client's model. ``Run.model`` and ``from_pretrained`` make it; the base loads when it is first needed.

    Args:
        client: The client's name.
        home: Where the model comes from.
    """

    def __init__(self, client: str, home: Home) -> None:
        self.client, self._home = client, home
        self._at_close: Callable[[], None] = lambda: None  # the run belongs to others

    @property
    def state(self) -> str:
        """The model's state: zero_shot, global, personalized or chosen."""
        return self._home.state

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        client: str | None = None,
        *,
        state: str | None = None,
        base: str | Path | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> PersonalModel:
        """Load a personal model from a run directory, from an exported folder, or from the hub.

        Args:
            source: A run directory, a folder written by ``save_pretrained`` or `flexperts export`, or a hub id.
            client: The client; needed for a run directory.
            state: zero_shot, global, personalized or chosen, of a run; by default the most personal one.
            base: Folder or hub id of the base, if it is not where the run or the folder says.
            dtype: bfloat16 or float32, the base's type in training, where an exported folder does not say it.
            revision: Branch, tag or commit on the hub.
            token: The hub's access token; by default the one that is stored on this machine.
            trust_remote_code: Whether code that comes with the base or the folder may run.

        Raises:
            FlexpertsError: There is no such model or client, or its files are damaged.
        """
        folder, its = Path(source), None if base is None else str(base)
        if not folder.is_dir():
            folder = fetched(str(source), revision=revision, token=token)
        if (folder / "config.toml").is_file():
            if client is None:
                raise ConfigError(
                    "client", "a run has a model for each client", "name one, such as client='clinic'"
                )
            from flexperts.library.run import Run  # it imports this module

            run = Run(folder, base=its, trust_remote_code=trust_remote_code)
            model = run.model(client, state)
            _ = model._home.encoder  # the base and the client's state load now, so that errors come here
            model._at_close = run.close
            return model
        home = ExportedFolder(folder, its, dtype, trust_remote_code=trust_remote_code)
        owner = home.about.get("client")
        if (client is not None and owner and normal(client) != owner) or state not in (None, home.state):
            holds = f"{folder} holds one model, {owner or 'of one client'}, {home.state}"
            raise ConfigError(f"client {client!r}, state {state!r}", holds, "leave client and state out")
        _ = home.encoder  # likewise
        model = cls(normal(client or owner or folder.name), home)
        model._at_close = home.close
        return model

    def chat(self, messages: Sequence[Mapping[str, Any]], *, max_new_tokens: int | None = None) -> Answer:
        """Return the greedy answer to a conversation.

        Args:
            messages: Turns with ``role`` (system, user, assistant) and ``content``; the last one is the user's.
            max_new_tokens: Longest answer in tokens; by default as in the run's evaluation, or 256 without a run.

        Returns:
            A string with attributes: ``tokens``, and ``cut``, whether the limit ended the answer.

        Raises:
            FlexpertsError: The conversation has other roles, or does not fit the base.
        """
        [answer] = self.generate([messages], max_new_tokens=max_new_tokens)
        return answer

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int | None = None, batch_size: int | None = None
    ) -> list[Answer]:
        """Return the greedy answers to prompts, in their order.

        Args:
            prompts: Each is an instruction, a row with ``instruction`` and maybe ``context``, or a conversation.
            max_new_tokens: As for ``chat``.
            batch_size: Prompts that are answered together; by default as in the run's evaluation, or 8.

        Raises:
            FlexpertsError: A prompt is none of these, or does not fit the base.
        """
        if isinstance(prompts, str | Mapping):
            raise DataError("prompts", "they are a list", "write generate([prompt])")
        encoder = self._home.encoder
        encoded = [_encoded(encoder, prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        return self._home.answers(encoded, max_new_tokens, batch_size) if encoded else []

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens up to where the answer starts, as in training; see ``generate``."""
        return _encoded(self._home.encoder, prompt, "the prompt")

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """Yield the torch model, set up for this client inside the block; prompts are those of ``encode``.

        Raises:
            ConfigError: The method sets the model up for every batch.
        """
        with self._home.in_use() as model:
            yield model

    def save_pretrained(self, folder: str | Path, *, form: str | None = None) -> None:
        """Write the model as a folder for transformers, PEFT and ``from_pretrained``, with a model card.

        The base is loaded again for it, and once more in the process that checks the folder.

        Args:
            folder: The folder to create.
            form: transformers, merged, adapter, personal or gguf, as `flexperts export` makes them; by default the
                smallest that holds the model for ``from_pretrained``.

        Raises:
            FlexpertsError: The folder exists, or the form cannot hold the model.
        """
        self._home.write(Path(folder), form)

    def push_to_hub(
        self, repo_id: str, *, private: bool = True, form: str | None = None, token: str | None = None
    ) -> str:
        """Upload the model to the hub, and return its address there.

        What leaves this machine is printed first: the files of ``save_pretrained``. They are weights that were
        trained on this client's rows and may repeat them, and a card with counts of rows, this client's scores and
        its name. No row, no other client's personal weights and no path are in them.

        Args:
            repo_id: ``name`` or ``owner/name``; the repository is created if it does not exist.
            private: Whether only its owner may read it; a public repository of this name is then refused.
            form: As for ``save_pretrained``.
            token: The hub's access token; by default the one that is stored on this machine.

        Raises:
            PrivacyError: ``private`` is true, and the repository exists and is public.
            ArtifactError: The hub refuses, or cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="flexperts-") as place:
            folder = Path(place) / folder_name(repo_id)
            self._home.write(folder, form)
            for line in leaving(folder, repo_id, self.client, private=private):
                console().print(line, soft_wrap=True)
            return push(folder, repo_id, private=private, token=token)

    def close(self) -> None:
        """Free the run or the base, if ``from_pretrained`` opened it."""
        self._at_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PersonalModel({self.client!r}, {self.state}, of {self._home.place})"


def _encoded(encoder: PromptEncoder, prompt: Prompt, where: str) -> list[int]:
    if isinstance(prompt, str):
        return encoder.prompt(prompt)
    if isinstance(prompt, Mapping):
        instruction, context = prompt.get("instruction"), prompt.get("context") or ""
        if not isinstance(instruction, str) or not isinstance(context, str):
            rule = "a row has a text `instruction`, and its `context` is text"
            raise DataError(where, rule, "give these columns as text")
        return encoder.prompt(instruction, context)
    turns = [turn for turn in prompt if isinstance(turn, Mapping)] if isinstance(prompt, Sequence) else []
    if not turns or len(turns) != len(prompt) or not all(map(_is_message, turns)):
        rule = "it is an instruction, a row, or a list of messages whose role and content are text"
        raise DataError(where, rule, 'write messages as {"role": "user", "content": "..."}')
    return encoder.conversation(turns)


def _is_message(turn: Mapping[str, Any]) -> bool:
    return all(isinstance(turn.get(key), str) for key in ("role", "content"))
