"""Images and labels, read by timm. One rule: a sample depends only on seed, epoch and index, not on its loader."""

from .folders import Data as Data
from .folders import Digits as Digits
from .folders import find_unreadable as find_unreadable
from .folders import leave_out as leave_out
from .folders import listed as listed
from .folders import size_of as size_of
from .folders import take_share as take_share
from .images import Images as Images
from .images import as_rgb as as_rgb
from .images import seed_all as seed_all
from .loader import Loader as Loader
from .loader import create_loaders as create_loaders
from .loader import worker_errors as worker_errors
from .open import open_data as open_data
from .sampler import Batches as Batches
from .streams import Stream as Stream
from .streams import check_shards as check_shards
from .streams import shards as shards
