"""Web pages for a dermis service: generate, edit, check and classify synthetic dermoscopy in a browser.

The studio is a client of the service like any other. It acts only with the credentials of its visitors.
"""

from dermis_studio._version import __version__

__all__ = ["__version__"]
