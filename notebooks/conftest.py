"""Under nbval the notebooks draw no progress bars: as outputs they would differ from run to run."""

import os

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
