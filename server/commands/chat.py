"""`octavo chat`."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from engine.config import EngineConfig, add_flags, load_all
from engine.errors import ConfigError, InvalidRequestError
from server.commands.terminal import Terminal, TerminalConfig, show, standard_input, terminal
from server.config import ServerConfig

if TYPE_CHECKING:
    from server.chat_template import ChatTemplate

_HELP = "/reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sampling and the model."""
    answers = parser.add_argument_group("the answers")
    add_flags(answers, TerminalConfig)
    answers.add_argument(
        "--chat-template",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file with a Jinja chat template to use instead of the model's (OCTAVO_CHAT_TEMPLATE)",
    )
    add_flags(parser.add_argument_group("the model"), EngineConfig)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings (OCTAVO_CONFIG)")


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    # ServerConfig is among them for the template, and so that one file can serve all commands.
    engine_config, config, server_config = load_all((EngineConfig, TerminalConfig, ServerConfig), vars(args))

    stdin = standard_input()

    from engine.launch import load_engine
    from server.chat_template import load_template

    engine = load_engine(engine_config)
    template = load_template(server_config.chat_template, engine.tokenizer)
    if template is None:
        raise ConfigError(f"{engine.model_name} has no chat template; try `octavo generate`")
    if stdin.isatty():
        print(f"{engine.model_name}. {_HELP}")
    with terminal(engine, config) as console:
        _talk(Conversation(console, template, config.system))
    return 0


class Conversation:
    """The turns so far."""

    def __init__(self, console: Terminal, template: "ChatTemplate", system: str | None) -> None:
        self._console = console
        self._template = template
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def say(self, words: str) -> None:
        """Put the user's words to the model and show its answer; both stay, unless the model cannot take them.

        Raises:
            InvalidRequestError: the template refuses the turn, or the conversation is too long.
        """
        turns = [*self.turns, {"role": "user", "content": words}]
        text = self._template.render([*self._system, *turns])
        prompt = self._console.engine.tokenizer.encode(text, add_special_tokens=False)
        answer, complete = self._console.answer(prompt, show)
        print("" if complete else " …")
        self.turns = [*turns, {"role": "assistant", "content": answer}]


def _talk(conversation: Conversation) -> None:
    prompt = ">>> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 — importing it gives `input` its line editing and history
    while True:
        try:
            words = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}")
            continue
        match words:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                conversation.turns = []
                print("The conversation starts over.")
            case _:
                try:
                    conversation.say(words)
                except InvalidRequestError as error:
                    print(f"{error} (/reset starts over)", file=sys.stderr)
