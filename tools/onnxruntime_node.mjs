// An exported detector in JavaScript: runs model.onnx with onnxruntime-node and writes its outputs.
//
//     npm install --ignore-scripts onnxruntime-node
//     node tools/onnxruntime_node.mjs DIR BATCH HEIGHT WIDTH INPUT OUTPUT [PACKAGE]
//
// INPUT has the bytes of a batch (N, 3, HEIGHT, WIDTH) of uint8, channels as detector.json says. Into the folder OUTPUT
// goes a file NAME.bin for each output of the network: float32, little endian. They equal those of aqdet.runtime to the
// bit. HEIGHT and WIDTH are multiples of size_divisibility in detector.json. PACKAGE may be onnxruntime-web, which runs
// in browsers too; then the file is fetched there, and not read.

import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, batch, height, width, input, output, name = "onnxruntime-node"] = process.argv.slice(2);
if (output === undefined) {
  console.error("usage: node onnxruntime_node.mjs DIR BATCH HEIGHT WIDTH INPUT OUTPUT [PACKAGE]");
  process.exit(2);
}
// Found from the current folder, where npm has put it, and not from where this file is.
const ort = createRequire(join(process.cwd(), "package.json"))(name);
const shape = [Number(batch), 3, Number(height), Number(width)];
const pixels = new Uint8Array(readFileSync(input));
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(join(folder, "model.onnx"))));
const results = await session.run({ [session.inputNames[0]]: new ort.Tensor("uint8", pixels, shape) });
mkdirSync(output, { recursive: true });
for (const [name, tensor] of Object.entries(results)) {
  const { buffer, byteOffset, byteLength } = tensor.data;
  writeFileSync(join(output, `${name}.bin`), Buffer.from(buffer, byteOffset, byteLength));
  console.log(`${name} [${tensor.dims}]`);
}
