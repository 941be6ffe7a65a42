"""The largest numbers that a request may hold: above them stands a slip of the finger, or no end."""

EPOCHS = 100_000
STEPS = 1_000_000_000
ROUNDS = 100
BATCH_SIZE = 65_536
IMAGES = 1_000_000_000
IMAGE_SIZE = 16_384  # pixels a side
EXAMPLE = 50_000_000  # numbers of one example of a net's inputs
CHANNELS = 1_000_000  # of a layer, and of all layers together
LAYERS = 1_000  # of a net
READINGS = 20_000_000  # of a channel by a layer, in a net
PARAMS = 10_000_000_000
REPEATS = 1_000_000
WORKERS = 1_024
MEGABYTES = 100_000_000
SEED = 2**32 - 1
STD = (1e-6, 1e3)  # of pixels in [0, 1], whose mean lies there too
