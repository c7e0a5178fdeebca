#!/bin/sh
# Installs gdrt_ds into the Python of an image. Both recipes beside this file run it in the folder
# of the sources.
# TORCH_INDEX: index of torch, e.g. https://download.pytorch.org/whl/cpu for an image without CUDA.
set -eu

# torch alone and first: unpinned, other packages would pull another build of it.
python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
python -m pip install -c constraints.txt '.[serve,tensorboard]'

# The image is of use only if the commands start.
gdrt-train --help > /dev/null
gdrt-serve --help > /dev/null
