"""`python -m epsdpo.train`, alone or under `accelerate launch`: see `preferences`."""

import sys

from epsdpo.train.preferences import main

sys.exit(main())
