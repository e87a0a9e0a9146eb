"""An engine that stands in mid-answer; run as a program, `nr-serve serve` over it."""

import sys
import threading

from nr_serve import assemble, cli
from tests.fakes import FakeEngine, tokenizer
from tests.waiting import PATIENCE


class Halting(FakeEngine):
    """Writes two tokens, then stands until it may go on."""

    def __init__(self, deliver) -> None:
        super().__init__(deliver)
        self.may_go_on = go_on = threading.Event()

        class Letters(list):
            def __getitem__(self, i):
                assert i < 2 or go_on.wait(PATIENCE)
                return 97

        self.answer = lambda submit: Letters()

    def stop(self) -> None:
        self.may_go_on.set()
        super().stop()


class Loading(FakeEngine):
    """Loads its base for ever, and cannot be stopped meanwhile."""

    def __init__(self, deliver) -> None:
        super().__init__(deliver)
        self.may_load.clear()

    def stop(self) -> None:
        self._thread.join()


def main(flags: list[str]) -> int:
    kind = Loading if "loading" in flags else Halting
    flags = [flag for flag in flags if flag != "loading"]
    assemble.EngineLoop = lambda config, model, tokenizer, deliver: kind(deliver)
    assemble.load_tokenizer = lambda model: tokenizer()
    return cli.main(["serve", "--model", "x", *flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
