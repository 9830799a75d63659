"""`python -m hylra_gguf` is the command `hylra-gguf`."""

import sys

from hylra_gguf.cli import main

sys.exit(main())
