"""dermis: synthetic dermoscopy. The library: no web framework, no training loop, no command line.

Import the package that you need (`dermis.bundle`, `dermis.synthesizer`, `dermis.dataset`, ...). This module imports
nothing.
"""

__version__ = "0.2.0"
