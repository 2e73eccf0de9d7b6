"""dermis: synthetic dermoscopy that people can trust. The domain library: no web, no training loop, no command line.

Import the room you need (`dermis.bundle`, `dermis.synthesizer`, `dermis.dataset`, ...): this module imports nothing
heavy.
"""

__version__ = "0.1.0"
