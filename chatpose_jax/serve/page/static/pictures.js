// Pictures that a person gives: as data: addresses, the only ones that the server takes.

const KNOWN = ['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/bmp'];
const MOST_BYTES = 1.5e6;
const MOST_PIXELS = 1600;

/** A data: address of an image file. Large files, and kinds that the server does not read, become a JPEG of at most 1600 pixels. */
export async function read(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || 'This file'} is no picture that this browser can read.`);
  }
  if (KNOWN.includes(file.type) && file.size <= MOST_BYTES) return asAddress(file);
  const scale = Math.min(1, MOST_PIXELS / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext('2d');
  pen.fillStyle = 'white';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/jpeg', 0.92);
}

function asAddress(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** The image files of a drop or a paste. */
export const imagesIn = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith('image/'));
