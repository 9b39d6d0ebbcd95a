"""Settings, files, devices, images: used everywhere, imports nothing above."""

import sys

if sys.platform == "win32":  # before the imports of modules that only Unix has
    sys.exit("error: nanoGPT-Vision runs on Linux and macOS, and on Windows inside WSL "
             "(https://learn.microsoft.com/windows/wsl/install)")
