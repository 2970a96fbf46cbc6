"""Whisper tiny under other attentions: word error rate on spoken clips with a transcript.

Clips out of two Debian packages: read sentences and card phrases (pocketsphinx, several speakers, 16 kHz) and prompts
of a telephone system (asterisk, one speaker, 8 kHz, raised to 16).
"""

from __future__ import annotations

import gzip
import random
import re
import wave
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly

from clearhead.data.cache import cache_folder
from clearhead.data.models import model_folder
from clearhead.errors import UserError
from experiments.adopt_encoders.under import opened, under

PACKAGES = "pocketsphinx-testdata asterisk-core-sounds-en asterisk-core-sounds-en-wav"
MOST_TOKENS = 64
_SPHINX = "usr/share/pocketsphinx/test/data"
_SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class Job:
    """One attention on all clips."""

    attention: str
    prompts: int
    """Clips of the telephone system; the ten others are always in."""


@dataclass(frozen=True)
class Clip:
    """Where it lies and what is said."""

    source: str
    path: Path
    text: str


def root() -> Path:
    """The folder below which the packages were unpacked. Raises `UserError` with the command."""
    for place in (cache_folder() / "debian", Path("/")):
        if (place / _SPHINX).is_dir() and (place / _SOUNDS).is_dir() and (place / _TEXTS).is_file():
            return place
    unpack = f'(cd "$(mktemp -d)" && apt-get download {PACKAGES} && for deb in *.deb; do dpkg -x "$deb" '
    raise UserError(f"the clips come with Debian; run: {unpack}{cache_folder() / 'debian'}; done)")


def clips(prompts: int) -> list[Clip]:
    """The ten clips of pocketsphinx, and some prompts of 5 words and more, drawn once."""
    place = root()
    found = []
    for part, name in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in (place / _SPHINX / part / name).read_text().splitlines():
            match = re.fullmatch(r"<s>(.*)</s> \((.*)\)", line.strip())
            if match:
                found.append(Clip(part, place / _SPHINX / part / f"{match[2]}.wav", match[1].strip()))
    lines = gzip.decompress((place / _TEXTS).read_bytes()).decode().splitlines()
    spoken = [match for line in lines if (match := re.match(r"([\w/-]+): ([A-Z][^\[\]{}()]*)$", line))]
    fit = [(name, text) for name, text in (m.groups() for m in spoken) if 5 <= len(words(text)) <= 25]
    fit = [(name, text) for name, text in fit if (place / _SOUNDS / f"{name}.wav").is_file()]
    for name, text in random.Random(0).sample(sorted(fit), prompts):
        found.append(Clip("prompts", place / _SOUNDS / f"{name}.wav", text))
    return found


def sound(path: Path) -> np.ndarray:
    """Samples between -1 and 1, 16 kHz."""
    with wave.open(str(path)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2 or file.getframerate() not in (8_000, 16_000):
            raise ValueError(f"{path}: expected 16-bit mono at 8 or 16 kHz")
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    return samples if rate == 16_000 else resample_poly(samples, 2, 1).astype(np.float32)


def words(text: str) -> list[str]:
    """Small letters, numerals below ten as words, no punctuation; a hyphen parts two words."""
    plain = re.sub(r"\d", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower().replace("mr.", "mister"))
    return re.findall(r"[a-z']+", plain.replace("-", " "))


def word_errors(said: list[str], heard: list[str]) -> int:
    """Least substitutions, insertions and deletions from the one to the other."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


@lru_cache(maxsize=1)
def loaded() -> tuple[Any, Any]:
    """Model and processor."""
    from transformers import AutoProcessor

    return opened("whisper-tiny"), AutoProcessor.from_pretrained(model_folder("whisper-tiny"))


def measure(job: Job) -> dict[str, Any]:
    """Transcribe each clip greedily."""
    torch.set_num_threads(1)
    model, processor = loaded()
    found = []
    with under(model, job.attention) as patched, torch.no_grad():
        for clip in clips(job.prompts):
            inputs = processor(sound(clip.path), sampling_rate=16_000, return_tensors="pt").input_features
            tokens = patched.generate(inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
            text = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
            said, heard = words(clip.text), words(text)
            found.append(
                {
                    "source": clip.source,
                    "clip": clip.path.stem,
                    "heard": text,
                    "errors": word_errors(said, heard),
                    "words": len(said),
                }
            )
    return {"clips": found}
