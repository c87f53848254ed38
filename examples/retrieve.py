"""What a user of a shared retriever writes: load it, embed images, find and draw the nearest.

    python -m vptsp.examples.retrieve runs/quickstart

The images are the scanned digits 7 to 9, which `make quickstart` has tuned the retriever for without showing them. The
picture goes to `pictures/neighbours.png` in the retriever's folder, and the images to `images`, for a search page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel

from vptsp import choose_queries, load_splits, nearest_neighbours, open_image, save_neighbour_grid


def main(argv=None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the retriever's")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of queries that are drawn")
    args = parser.parse_args(argv)

    processor = AutoImageProcessor.from_pretrained(args.folder)
    model = AutoModel.from_pretrained(args.folder, trust_remote_code=True)

    test = load_splits("digits", train_classes=["3", "4", "5", "6"], test_classes=["7", "8", "9"])["test"]
    images = [open_image(row["image"]["bytes"]) for row in test]
    labels = torch.tensor(test["label"])
    names = test.features["label"].names
    with torch.inference_mode():
        batches = [processor(images[i : i + 64], return_tensors="pt") for i in range(0, len(images), 64)]
        embeddings = torch.cat([model(**batch).embeddings for batch in batches])

    similarity, index = nearest_neighbours(embeddings, k=8)
    chosen = choose_queries(labels, 6, seed=args.seed)
    save_neighbour_grid(
        args.folder / "pictures" / "neighbours.png",
        query_images=[images[q] for q in chosen],
        neighbour_images=[[images[n] for n in index[q]] for q in chosen],
        query_names=[names[labels[q]] for q in chosen],
        neighbour_names=[[names[labels[n]] for n in index[q]] for q in chosen],
        similarity=similarity[chosen],
        correct=labels[index[chosen]] == labels[chosen][:, None],
        title="Digits that neither backbone nor prompts were trained on",
    )
    recall = (labels[index[:, 0]] == labels).double().mean().item()
    print(f"reloaded          recall_at_1 {100 * recall:.2f}")

    for row in test:  # as files, for the search page
        path = args.folder / "images" / row["image"]["path"].removeprefix("digits/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])


if __name__ == "__main__":
    main()
