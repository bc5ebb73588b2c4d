#!/bin/sh
# Plays Python in the tests that install ONNX Runtime: runs the file `script` that lies beside the name it is
# called by. It is linked to and never written by a test, because a file that is open for writing cannot be run.
for arg; do
    [ "$last" = --dest ] && dest=$arg
    last=$arg
done
. "$(dirname "$0")/script"
