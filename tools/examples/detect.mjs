// Detects objects in an image with an exported detector, in JavaScript. Prints a line for each object:
//
//     CLASS SCORE X1 Y1 X2 Y2
//
//     npm install --ignore-scripts onnxruntime-node
//     node detect.mjs model.end_to_end.onnx image.ppm
//
// model.end_to_end.onnx is written by `export_model.py --end-to-end`. The image is a binary PPM, which is nothing but a
// size and RGB bytes (`convert photo.jpg -resize 800x800 image.ppm`): any other decoder that gives such bytes will do.
// It is to have the size at which the detector was trained, since nothing resizes it here; detector.json has that size.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [model, picture] = process.argv.slice(2);
if (picture === undefined) {
  console.error("usage: node detect.mjs model.end_to_end.onnx image.ppm");
  process.exit(2);
}
// Found from the current folder, where npm has put it, and not from where this file is.
const ort = createRequire(join(process.cwd(), "package.json"))("onnxruntime-node");

// "P6", width, height and 255, apart by white space; then one byte of it, and the pixels row by row.
const file = readFileSync(picture);
const header = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(file.toString("latin1", 0, 64));
if (header === null) {
  console.error(`error: ${picture} is no binary PPM of 8 bits without comments`);
  process.exit(2);
}
const [width, height] = [Number(header[1]), Number(header[2])];
const pixels = new Uint8Array(file.subarray(header[0].length));

// One image of RGB bytes in; the objects of all images out, the surest first.
const session = await ort.InferenceSession.create(model);
const images = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
const { boxes, scores, classes } = await session.run({ images });
for (let i = 0; i < scores.data.length; i++) {
  const box = boxes.data.slice(4 * i, 4 * i + 4);
  console.log(Number(classes.data[i]), scores.data[i], ...box);
}
