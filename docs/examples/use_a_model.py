"""Use a trained model on an image of your own. Research use only.

    python docs/examples/use_a_model.py runs/quickstart/checkpoints/best.ckpt FILM [FILM …]

The model is a checkpoint of `mtmedformer fit` or a folder of `mtmedformer export`; a film is a DICOM, PNG, JPEG or TIFF
file.
"""

import sys

import mtmedformer


def main(path: str, *films: str) -> None:
    """Print the prediction for each film."""
    model = mtmedformer.load(path)
    for film in films:
        result = model.predict(film)  # or a numpy array (height, width)
        print(f"{film}: {result.size[1]} x {result.size[0]} pixels ({result.note})")
        for task, classes in result.classes.items():
            calibrated = "calibrated" if task in result.calibrated else "not calibrated"
            print(f"  {task}:", ", ".join(f"{name} {p:.2f}" for name, p in classes.items()), f"({calibrated})")
        for task, boxes in result.boxes.items():
            for box in [box for box in boxes if box.score >= 0.3]:
                corners = ", ".join(f"{value:.0f}" for value in box.xyxy)
                print(f"  {task}: {box.name}, score {box.score:.2f}, at x0, y0, x1, y1 = {corners}")
        for task, masks in result.masks.items():
            for name, mask in masks.items():
                print(f"  {task}: {name} covers {mask.mean():.1%} of the image")


if __name__ == "__main__":
    main(*sys.argv[1:])
