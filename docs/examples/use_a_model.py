"""Use a trained model on an image of your own. Research use only.

    python docs/examples/use_a_model.py runs/quickstart/checkpoints/best.ckpt FILM [FILM …]

The model is a checkpoint of `mtmedformer fit` or a folder of `mtmedformer export`; a film is a DICOM, PNG, JPEG or TIFF
file.
"""

import sys

import mtmedformer


def main(path: str, *films: str) -> None:
    """Print what the model says of each film."""
    model = mtmedformer.load(path)
    for film in films:
        found = model.predict(film)  # a numpy array (height, width) will do as well
        print(f"{film}: {found.size[1]} x {found.size[0]} pixels ({found.note})")
        for task, classes in found.classes.items():
            calibrated = "calibrated" if task in found.calibrated else "not calibrated"
            print(f"  {task}:", ", ".join(f"{name} {p:.2f}" for name, p in classes.items()), f"({calibrated})")
        for task, boxes in found.boxes.items():
            for box in [box for box in boxes if box.score >= 0.3]:
                corners = ", ".join(f"{value:.0f}" for value in box.xyxy)
                print(f"  {task}: {box.name}, score {box.score:.2f}, at x0, y0, x1, y1 = {corners}")
        for task, masks in found.masks.items():
            for name, mask in masks.items():
                print(f"  {task}: {name} covers {mask.mean():.1%} of the image")


if __name__ == "__main__":
    main(*sys.argv[1:])
