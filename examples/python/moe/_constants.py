"""Every constant of the library's headers, one enumeration a group.

The numbers are permanent (they are part of the stable ABI). A member's name is the C name without
the group's prefix, which PREFIXES holds; the tests compare each with moe_constant().
"""

from __future__ import annotations

import enum
from typing import Dict, Type


class Status(enum.IntEnum):
    """What a call returns: 0 or a negative number. C: MOE_OK, MOE_ERROR_*."""

    OK = 0
    INVALID_ARGUMENT = -1
    OUT_OF_MEMORY = -2
    INVALID_STATE = -3
    NOT_SUPPORTED = -4
    STRUCT_SIZE = -5
    STRUCT_TOO_OLD = -6
    STRUCT_TOO_NEW = -7
    OVERFLOW = -8
    BUFFER_TOO_SMALL = -9
    CORRUPT_DATA = -10
    CALLBACK = -11
    SYSTEM = -12
    DEVICE = -13
    TRANSPORT = -14
    TIMEOUT = -15
    INTERNAL = -16
    WRONG_GRADIENT = -17


class DType(enum.IntEnum):
    """Element types."""

    F32 = 0
    F64 = 1
    BF16 = 2
    F16 = 3
    I32 = 16
    I64 = 17


class Backend(enum.IntEnum):
    """Where a context computes."""

    CPU = 0
    CUDA = 1


class Isa(enum.IntEnum):
    """Instruction sets of the CPU backend."""

    AUTO = 0
    PLAIN = 1
    AVX2 = 2
    AVX512 = 3


class Log(enum.IntEnum):
    """Levels of a log line."""

    ERROR = 0
    WARNING = 1
    INFO = 2
    DEBUG = 3


class GateKind(enum.IntEnum):
    """How experts are chosen. C: MOE_GATE_*."""

    TOP_K = 0
    NOISY_TOP_K = 1
    SOFTMAX_DENSE = 2
    BALANCED = 3
    HIERARCHICAL = 4
    EXPERT_CHOICE = 5
    HASH = 6
    SINKHORN = 7


class Score(enum.IntEnum):
    """What turns a logit into a score."""

    SOFTMAX = 0
    SIGMOID = 1


class Order(enum.IntEnum):
    """How the weights of the chosen come from the scores."""

    SELECT_THEN_SCORE = 0
    SCORE_THEN_SELECT = 1


class ChoiceNoise(enum.IntEnum):
    """Noise on the choice alone."""

    NONE = 0
    GUMBEL = 1
    GUMBEL_REST = 2


class SecondChoice(enum.IntEnum):
    """Whether the choices after the first get a row."""

    ALL = 0
    NONE = 1
    THRESHOLD = 2
    RANDOM = 3


class LossScope(enum.IntEnum):
    """Over what the switch and gshard losses take their means."""

    BATCH = 0
    GROUP = 1


class Secondary(enum.IntEnum):
    """Where the secondary gates of a hierarchical gate are."""

    REPLICATED = 0
    WITH_GROUP = 1


class SequenceCounts(enum.IntEnum):
    """Which tokens a sequence loss counts for an expert."""

    SCORES = 0
    ROUTED = 1


class Capacity(enum.IntEnum):
    """How many rows an expert takes from a token group."""

    NONE = 0
    NUMBER = 1
    FACTOR = 2


class Round(enum.IntEnum):
    """How a capacity factor's product becomes a number of rows."""

    UP = 0
    DOWN = 1
    NEAREST = 2
    PER_CHOICE = 3
    TOKENS_UP = 4


class Drop(enum.IntEnum):
    """Which entries stay when an expert is full."""

    TOKEN_ORDER = 0
    CHOICE = 1
    BATCH_PRIORITY = 2
    SCORE = 3
    RANDOM = 4


class Activation(enum.IntEnum):
    """An expert's activation; from SWIGLU on the expert is gated."""

    RELU = 0
    GELU_TANH = 1
    GELU_ERF = 2
    SILU = 3
    SWIGLU = 16
    GEGLU_TANH = 17
    GEGLU_ERF = 18
    REGLU = 19


class Glu(enum.IntEnum):
    """Where the gate and up projections of a gated expert lie."""

    SEPARATE = 0
    GATE_UP = 1
    UP_GATE = 2
    INTERLEAVED = 3


class WeightLayout(enum.IntEnum):
    """Order of a weight's last two dimensions. C: MOE_WEIGHT_IN_OUT, MOE_WEIGHT_OUT_IN."""

    IN_OUT = 0
    OUT_IN = 1


class Storage(enum.IntEnum):
    """How a pool keeps its weights."""

    ROW_MAJOR = 0
    PREPACKED = 1
    PANELS = 2


class Values(enum.IntEnum):
    """What of a parameter is exported or imported."""

    DATA = 0
    GRADIENT = 1


class Output(enum.IntEnum):
    """A function applied to an output."""

    LINEAR = 0
    SIGMOID = 1


class WeightOn(enum.IntEnum):
    """What the plan's weight multiplies."""

    OUTPUT = 0
    HIDDEN = 1
    INPUT = 2


class ExpertsKind(enum.IntEnum):
    """What an expert of a pool is. C: MOE_EXPERTS_*."""

    FEED_FORWARD = 0
    IDENTITY = 1
    CALLBACK = 2


class Dropped(enum.IntEnum):
    """What the routed part of y is for a token without a row."""

    ZERO = 0
    PASS_THROUGH = 1
    UNTOUCHED = 2


class Exchange(enum.IntEnum):
    """How rows travel between ranks."""

    EXACT = 0
    PADDED = 1


class Received(enum.IntEnum):
    """What happens when more than max_received rows come to a rank."""

    ERROR = 0
    DROP_POSITION = 1
    DROP_SCORE = 2
    CHUNK = 3


class Batch(enum.IntEnum):
    """What losses and statistics are of."""

    LOCAL = 0
    GLOBAL = 1


class Parameters(enum.IntEnum):
    """Where the parameters of an object live at its creation."""

    OWNED = 0
    OWNED_NO_GRAD = 1
    BOUND = 2


class Kind(enum.IntEnum):
    """How a parameter is trained."""

    WEIGHT = 0
    BUFFER = 1
    THRESHOLD = 2


class Shard(enum.IntEnum):
    """How a parameter is spread over ranks."""

    REPLICATED = 0
    EXPERT = 1
    EXPERT_WIDTH = 2


class Loss(enum.IntEnum):
    """Indices of the losses."""

    IMPORTANCE = 0
    LOAD = 1
    SWITCH = 2
    GSHARD = 3
    Z = 4
    SEQUENCE = 5
    THRESHOLD = 6


class Stat(enum.IntEnum):
    """Indices of the statistics."""

    TOKENS = 0
    ENTRIES = 1
    ROWS = 2
    DROPPED = 3
    TOUCHED = 4
    CV_IMPORTANCE = 5
    CV_LOAD = 6
    MAX_OVER_MEAN = 7
    LOAD_ENTROPY = 8
    GATE_ENTROPY = 9


class Time(enum.IntEnum):
    """Indices of the times in a report."""

    GATE = 0
    PACK = 1
    EXCHANGE = 2
    EXPERTS = 3
    COMBINE = 4


class Tensor(enum.IntEnum):
    """What a pass can show of its last forward."""

    LOGITS = 0
    NOISY_LOGITS = 1
    NOISE_STD = 2
    IMPORTANCE = 3
    LOAD = 4
    COUNTS = 5
    ROWS = 6
    PRIMARY_LOAD = 7


class PlanUse(enum.IntEnum):
    """What a plan that is handed in is used for. C: MOE_PLAN_*."""

    IDS_AND_WEIGHTS = 0
    IDS = 1


class Check(enum.IntEnum):
    """With which parameters a layer's gradients are checked."""

    DRAWN = 0
    CURRENT = 1


class Forward(enum.IntFlag):
    """Flags of a forward."""

    TRAIN = 1
    NO_SAVE = 2
    PLAN_ONLY = 4
    RECOMPUTE = 8
    ADD = 16


class Backward(enum.IntFlag):
    """Flags of a backward."""

    OVERWRITE = 1
    SKIP_DX = 2
    SKIP_PARAMETERS = 4
    ADD_DX = 8


class Rows(enum.IntFlag):
    """Flags of dispatch and combine."""

    ADD = 1
    UNWEIGHTED = 2


class CommMemory(enum.IntFlag):
    """What a table of collectives can do."""

    HOST_MEMORY = 1
    DEVICE_MEMORY = 2
    STREAM_ORDERED = 4
    CAPTURABLE = 8


class CommState(enum.IntEnum):
    """How far an exchange is."""

    PENDING = 0
    DONE = 1


class FileDType(enum.IntEnum):
    """Element types of files beyond DType; of libmoe_io."""

    BOOL = 32
    U8 = 33
    I8 = 34
    U16 = 35
    I16 = 36
    U32 = 37
    U64 = 38
    F8_E4M3 = 39
    F8_E5M2 = 40
    F8_E8M0 = 41
    C64 = 42


class Family(enum.IntEnum):
    """Whose names the tensors of a model have; of libmoe_io."""

    MIXTRAL = 0
    QWEN3_MOE = 1
    QWEN2_MOE = 2
    DEEPSEEK_V3 = 3
    GPT_OSS = 4


FROM_CONFIG = -1
SAME = -1
NO_EXPERTS = -2
COMM_NO_REQUEST = -1
COMM_REFUSED = -1000
COMM_LATE = -1001
COMM_REQUESTS = 8
MAX_DIMS = 4
MAX_PARTS = 8
LOSS_SLOTS = 16
STAT_SLOTS = 16
TIME_SLOTS = 8
FILE_MAX_DIMS = 8
FILE_ALL = -1
CUDA_CURRENT = -1

# Constants that stand alone, by their C names.
SINGLES: Dict[str, int] = {
    "MOE_FROM_CONFIG": FROM_CONFIG,
    "MOE_SAME": SAME,
    "MOE_NO_EXPERTS": NO_EXPERTS,
    "MOE_COMM_NO_REQUEST": COMM_NO_REQUEST,
    "MOE_COMM_REFUSED": COMM_REFUSED,
    "MOE_COMM_LATE": COMM_LATE,
    "MOE_COMM_REQUESTS": COMM_REQUESTS,
    "MOE_MAX_DIMS": MAX_DIMS,
    "MOE_MAX_PARTS": MAX_PARTS,
    "MOE_LOSS_SLOTS": LOSS_SLOTS,
    "MOE_STAT_SLOTS": STAT_SLOTS,
    "MOE_TIME_SLOTS": TIME_SLOTS,
    "MOE_STATUS_LAST": -17,
}

# The C prefix of each enumeration's members; Status.OK is MOE_OK.
PREFIXES: Dict[Type[enum.IntEnum] | Type[enum.IntFlag], str] = {
    Status: "MOE_ERROR_",
    DType: "MOE_DTYPE_",
    Backend: "MOE_BACKEND_",
    Isa: "MOE_ISA_",
    Log: "MOE_LOG_",
    GateKind: "MOE_GATE_",
    Score: "MOE_SCORE_",
    Order: "MOE_ORDER_",
    ChoiceNoise: "MOE_CHOICE_NOISE_",
    SecondChoice: "MOE_SECOND_CHOICE_",
    LossScope: "MOE_LOSS_SCOPE_",
    Secondary: "MOE_SECONDARY_",
    SequenceCounts: "MOE_SEQUENCE_COUNTS_",
    Capacity: "MOE_CAPACITY_",
    Round: "MOE_ROUND_",
    Drop: "MOE_DROP_",
    Activation: "MOE_ACTIVATION_",
    Glu: "MOE_GLU_",
    WeightLayout: "MOE_WEIGHT_",
    Storage: "MOE_STORAGE_",
    Values: "MOE_PARAMETER_",
    Output: "MOE_OUTPUT_",
    WeightOn: "MOE_WEIGHT_ON_",
    ExpertsKind: "MOE_EXPERTS_",
    Dropped: "MOE_DROPPED_",
    Exchange: "MOE_EXCHANGE_",
    Received: "MOE_RECEIVED_",
    Batch: "MOE_BATCH_",
    Parameters: "MOE_PARAMETERS_",
    Kind: "MOE_KIND_",
    Shard: "MOE_SHARD_",
    Loss: "MOE_LOSS_",
    Stat: "MOE_STAT_",
    Time: "MOE_TIME_",
    Tensor: "MOE_TENSOR_",
    PlanUse: "MOE_PLAN_",
    Check: "MOE_CHECK_",
    Forward: "MOE_FORWARD_",
    Backward: "MOE_BACKWARD_",
    Rows: "MOE_ROWS_",
    CommMemory: "MOE_COMM_",
    CommState: "MOE_COMM_",
}

# The same of libmoe_io, which moe_constant() does not know.
IO_SINGLES: Dict[str, int] = {"MOE_FILE_MAX_DIMS": FILE_MAX_DIMS, "MOE_FILE_ALL": FILE_ALL}
IO_PREFIXES: Dict[Type[enum.IntEnum], str] = {FileDType: "MOE_FILE_", Family: "MOE_FAMILY_"}

# And of libmoe_cuda.
CUDA_SINGLES: Dict[str, int] = {"MOE_CUDA_CURRENT": CUDA_CURRENT}


def io_constants() -> Dict[str, int]:
    """Every constant of moe/io.h by its C name."""
    named = dict(IO_SINGLES)
    for group, prefix in IO_PREFIXES.items():
        named.update({prefix + member.name: int(member) for member in group})
    return named


def constants() -> Dict[str, int]:
    """Every constant of libmoe by its C name."""
    named = dict(SINGLES)
    for group, prefix in PREFIXES.items():
        for member in group:
            name = str(member.name)
            named["MOE_OK" if member is Status.OK else prefix + name] = int(member)
    return named
