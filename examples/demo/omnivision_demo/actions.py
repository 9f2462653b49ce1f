"""What the person does: twelve actions that differ in which joint angle *moves*, and in nothing a single frame shows.

A body has one channel for each action. A channel's value is amplitude * sin(phase), and every video draws every
channel's phase and amplitude from the same distribution. Its action's channel runs: its phase advances. The
others stand still at the phase they drew. So one frame, whatever its action, is a draw from one and the same
distribution of poses, and only a model that looks at several frames can tell the actions apart.
"""

import numpy as np
from numpy.typing import NDArray

ACTIONS = (
    "raise_arms",  # both arms, sideways, together
    "swing_arms",  # forwards and backwards, one against the other
    "curl_arms",  # both elbows together
    "punch",  # the elbows one against the other
    "straddle",  # legs apart and together
    "march",  # knees up in turn
    "squat",  # both knees
    "bow",  # torso forwards
    "sway",  # torso sideways
    "jump",  # up
    "sidestep",  # to the left and right
    "turn",  # about the vertical axis
)

# Turns a second. The slowest still shows 1.5 periods in any 1.3 seconds, the fastest 6 frames a period at 12 fps.
SLOWEST, FASTEST = 1.3, 2.0


def motion(label: int, frames: int, fps: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Channel values, float64 (frames, len(ACTIONS)), within about [-1, 1]; channel `label` is the one that runs."""
    channels = len(ACTIONS)
    seconds = np.arange(frames)[:, None] / fps  # (T, 1)
    # Everything is drawn for every channel, so that no stream of draws depends on the label.
    phase, wobble_phase, idle_phase = generator.uniform(0, 2 * np.pi, (3, channels))
    amplitude = generator.uniform(0.8, 1.0, channels)
    turns = generator.uniform(SLOWEST, FASTEST, channels)
    idle_turns = generator.uniform(0.2, 0.5, channels)
    # Nobody moves like clockwork: the speed varies by up to 6 percent.
    run = 2 * np.pi * turns * seconds + 0.2 * np.sin(2 * np.pi * 0.4 * seconds + wobble_phase)  # (T, C)
    running = np.arange(channels) == label
    value = amplitude * np.sin(phase + np.where(running, run, 0.0))
    # And nobody stands like a statue: all channels, the running one too, breathe a little.
    return value + 0.04 * np.sin(2 * np.pi * idle_turns * seconds + idle_phase)
