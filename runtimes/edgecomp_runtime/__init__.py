"""edgecomp_runtime: what goes on the device. Opens a compiled bundle and answers questions about images.

    from edgecomp_runtime import Bundle, Session
    session = Session(Bundle.open("BUNDLE"))
    for piece in session.generate("What does the sign say?", images=["street.jpg"]):
        print(piece, end="", flush=True)
"""
from edgecomp_runtime.bundle import Bundle
from edgecomp_runtime.errors import BundleError, EdgecompError, InputError, UnknownNameError
from edgecomp_runtime.sampling import Sampling
from edgecomp_runtime.session import Generation, Session, Statistics

__all__ = ["Bundle", "BundleError", "EdgecompError", "Generation", "InputError", "Sampling", "Session", "Statistics", "UnknownNameError"]
