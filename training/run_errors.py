"""What a training run can end with, other than a result. Light to import, so that a command can tell them apart."""

import signal


class ConfigError(ValueError):
    """A configuration that can't work, with what to change."""


class CheckpointError(ValueError):
    """A checkpoint that can't be gone on from. The message names the folder or file, and what is wrong with it."""


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written. The message names the folder and the reason; earlier ones are intact."""


class TrainingError(ValueError):
    """Training that can't have a result: there was not a single step, or no checkpoint can be the best."""


class TrainingInterrupted(KeyboardInterrupt, SystemExit):
    """A signal has ended training, after a checkpoint was saved.

    Left alone it ends the process without a traceback, with the status that shells give to the signal (130 for
    Ctrl-C, 143 for SIGTERM). Code that catches `KeyboardInterrupt` gets it too.

    Attributes:
        signal: Number of the signal.
        step: The step that was saved.
        code: Exit status.
    """

    def __init__(self, signum, step):
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signal, self.step, self.code = signum, step, 128 + signum


__all__ = ["CheckpointError", "CheckpointWriteError", "ConfigError", "TrainingError", "TrainingInterrupted"]
