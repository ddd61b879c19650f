"""Build the C core as a static library with strict flags, then the one extension over it.

Switches, all read from the environment and all for developers:
    MILLSTREAM_WERROR=1                      warnings in csrc/ are errors
    MILLSTREAM_DEBUG=1                       MS_DEBUG: assertions and invariant checks
    MILLSTREAM_SANITIZE=address,undefined    or thread
    MILLSTREAM_COVERAGE=1                    count the lines that run, for gcov
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext  # Cython's, where Cython is installed

BINDING = "src/millstream/_native.pyx"
CYTHON = [BINDING, *sorted(glob("src/millstream/*.pxd") + glob("src/millstream/_binding/*.pxi"))]
HEADERS = sorted(glob("csrc/*.h"))
SOURCES = sorted(glob("csrc/*.c"))

COVERAGE = os.environ.get("MILLSTREAM_COVERAGE") == "1"
DEBUG = os.environ.get("MILLSTREAM_DEBUG") == "1"
SANITIZE = os.environ.get("MILLSTREAM_SANITIZE", "")
WERROR = os.environ.get("MILLSTREAM_WERROR") == "1"


def refuse_unsupported() -> None:
    """Stop where a build might succeed and the result could not be trusted."""
    if sys.platform != "linux":
        sys.exit(f"millstream runs on Linux only; this is {sys.platform}")
    if sys.byteorder != "little":
        sys.exit("millstream's files are little-endian; big-endian machines are not supported")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit(
            "millstream does not support free-threaded builds of Python yet; this is"
            f" {sys.executable}: use the build with the GIL of the same version"
        )


def flags() -> tuple[list[str], list[str], list[str]]:
    """Return the flags of the core, of the binding, and of the linker."""
    both = ["-fPIC", "-fvisibility=hidden", "-pthread"]
    link = ["-pthread", "-Wl,-z,relro,-z,now"]
    if COVERAGE:
        both += ["-O0", "-g", "--coverage", "-fprofile-update=atomic"]
        link += ["--coverage", "-Wl,-u,__gcov_dump,-u,__gcov_reset"]  # for who leaves by os._exit
    elif DEBUG or SANITIZE:
        both += ["-O1", "-g", "-UNDEBUG", "-DMS_DEBUG", "-fno-omit-frame-pointer"]
    else:
        both += ["-O3"]
    if SANITIZE:
        both += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-U_FORTIFY_SOURCE"]
        link += [f"-fsanitize={SANITIZE}"]
    else:
        both += ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]
    core = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow"]
    core += ["-Wstrict-prototypes", *(["-Werror"] if WERROR else [])]
    # Nobody debugs by the locals of what Cython writes, and to record them takes GCC long.
    return core + both, [*both, *([] if COVERAGE or DEBUG or SANITIZE else ["-g1"])], link


class Build(build):
    """Leaves the core to the binding, which builds it at the same time."""

    sub_commands = [one for one in build.sub_commands if one[0] != "build_clib"]  # noqa: RUF012


class BuildCore(build_clib):
    """Recompiles the core when a header or a flag changed, not only when a source did."""

    def stamp(self) -> str:
        """Keep the flags of the last build in a file that every object depends on."""
        stamp = Path(self.build_temp, "flags.txt")
        wanted = "\n".join(flag for _, info in self.libraries for flag in info["cflags"])
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(wanted)
        return str(stamp)

    def run(self):
        """Compile what is older than a header or the stamp."""
        depends = [*HEADERS, self.stamp()]
        for _, info in self.libraries:
            info["obj_deps"] = {"": depends}
        super().run()


class BuildBinding(build_ext):
    """Builds the core beside the binding, so that `build_ext --inplace` alone is enough."""

    def run(self):
        """Rebuild the extension whenever the core is newer than it."""
        stamp = self.get_finalized_command("build_clib").stamp()
        for extension in self.extensions:
            extension.depends += [stamp]
        super().run()

    def build_extensions(self):
        """Compile the core while Cython and the compiler are busy with the binding, then link."""
        link = self.compiler.link_shared_object
        with ThreadPoolExecutor(1) as beside:
            core = beside.submit(self.run_command, "build_clib")

            def link_with_core(*arguments, **options):
                core.result()
                link(*arguments, **options)

            self.compiler.link_shared_object = link_with_core
            super().build_extensions()
            core.result()


if __name__ == "__main__":
    refuse_unsupported()
    core_flags, binding_flags, link_flags = flags()
    library = {"sources": SOURCES, "include_dirs": ["csrc"], "cflags": core_flags}
    extension = Extension(
        "millstream._native",
        [BINDING],
        include_dirs=["csrc"],
        depends=[*CYTHON, *HEADERS, *SOURCES],
        extra_compile_args=binding_flags,
        extra_link_args=link_flags,
    )
    setup(
        libraries=[("millstream_core", library)],
        ext_modules=[extension],
        cmdclass={"build": Build, "build_clib": BuildCore, "build_ext": BuildBinding},
        options={"build_ext": {"cython_c_in_temp": True, "cython_line_directives": COVERAGE}},
    )
