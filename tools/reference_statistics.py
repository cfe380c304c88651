"""Make the statistics of real images that samples are compared with: mu, sigma and features in one npz.

    python -m tools.reference_statistics --config configs/rectified_flow/ffhq64_rf_gaussian.py --output ffhq64.npz

The images are all those of config.data, not flipped, or those of --data_dir (npy, npz, folder, zip). The file is for
--target_path of evaluation_fid.py; mu and sigma have the form of EDM's reference files, and the features are for KID,
precision and recall. torchrun splits the images over its processes.
"""

from configs.command_line import run_script
from configs.default import Field
from datasets import load_images
from metrics.features import create_extractor
from metrics.statistics import MAX_FEATURES, ArrayImages, measure_source, open_images, write_statistics
from runtime.devices import start_processes
from runtime.terminal import UserError, print_message

FLAGS = {
    "output": Field("", "npz file to write"),
    "data_dir": Field("", "images to measure instead of the data set: npy, npz, folder or zip"),
    "max_features": Field(MAX_FEATURES, "largest number of features in the file, evenly spread over the images", low=0),
}


def main(config, args, given):
    """Measure the images and write the file."""
    if not args.output.endswith(".npz"):
        raise UserError(f"--output must name an .npz file, not {args.output!r}")
    with start_processes() as processes:
        extractor = create_extractor(config, processes.device)
        if args.data_dir:
            source = open_images(args.data_dir, config)
        else:
            images = load_images(config)
            source = ArrayImages(images.images, images.source)
        found = measure_source(source, extractor, config.eval.batch_size, processes, max_features=args.max_features)
        if processes.is_main:
            write_statistics(args.output, found, extractor)
            print_message(f"{args.output}: {extractor.name} of {found.name}, {len(found.features)} features kept")


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
