"""setup.cfg holds the project; this file only what cannot be said there: the optional kernels in C.

They are left out where there is no C compiler with OpenMP. OpenMP is not linked: its symbols are those
of the libgomp that PyTorch loads, so that both share one pool of threads.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "prune_dn.models._fused",
            ["prune_dn/models/fused.c"],
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ]
)
