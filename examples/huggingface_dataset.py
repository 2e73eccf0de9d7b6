"""Load a generated dataset with the Hugging Face library `datasets`.

Start a service first (`make serve`), then run

    python examples/huggingface_dataset.py --out lesions-parquet

It needs `dermis-client` and `datasets`. The dataset has the format parquet: its columns are typed, and `label` has the
names of the classes. The other formats load in the same way.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from dermis_client import DermisClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the service")
    parser.add_argument("--out", default="lesions-parquet", help="folder for the dataset")
    parser.add_argument("--count", type=int, default=50, help="images of each class")
    args = parser.parse_args()

    with DermisClient(args.url) as client:
        model = next(model for model in client.models.list() if model.default)
        dataset = client.datasets.create(dict.fromkeys(model.classes, args.count), seed=7, format="parquet")
        dataset.wait(progress=True).download(args.out)

    lesions = load_dataset(args.out, split="train")
    print(lesions.features)
    first = lesions[0]
    print(
        f"{len(lesions)} images; the first is {first['image'].size} px, {lesions.features['label'].int2str(first['label'])}"
    )

    # All that `datasets` offers works on it, for instance selecting a class.
    name = model.classes[-1]
    number = lesions.features["label"].str2int(name)
    print(f"{len(lesions.filter(lambda label: label == number, input_columns='label'))} images are {name}")


if __name__ == "__main__":
    main()
