"""Write one HTML page of samples as the model sees them: the image after its transform, each token with its label.

    python inspect_samples.py CHECKPOINT DATASET PAGE.html [--num-batches 20] [flags of training]

CHECKPOINT is a folder with config.json, tokenizer and processor, such as the converter writes; DATASET is what
DATASET_PATH is. The flags are training's: --decoder-seq-length, --prompt-format, --packing-buffer-size and others.
"""

from megatron_patch.data.inspect_samples import main
from megatron_patch.files.terminal import run

if __name__ == "__main__":
    run(main)
