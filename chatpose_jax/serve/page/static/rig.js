// A pose as a tree of joints, with or without a surface: from the skinned GLB of the server, or from the joints of its JSON. In glTF's axes: y up.

import * as THREE from 'three';
import { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';

/** What each frame's axes are, and the rotation that takes them to glTF's. */
export const FRAMES = {
  camera: { words: 'camera frame: x right, y down, z away from the camera', turn: new THREE.Quaternion(1, 0, 0, 0) },
  model: { words: 'model frame: y up, a resting body faces z', turn: new THREE.Quaternion(0, 0, 0, 1) },
  'z-up': { words: 'z-up frame: a resting body faces −y', turn: new THREE.Quaternion(-Math.SQRT1_2, 0, 0, Math.SQRT1_2) },
};

/**
 * @typedef {object} Rig
 * @property {number[]} parents of each joint, -1 for the root; a parent precedes its children
 * @property {THREE.Vector3[]} places of the joints relative to their parents, metres
 * @property {THREE.Quaternion[]} turns of the joints relative to their parents
 * @property {?Skin} skin
 *
 * @typedef {object} Skin
 * @property {THREE.BufferGeometry} geometry in the rest pose
 * @property {THREE.Matrix4[]} inverses of the joints at rest
 * @property {{joints: ArrayLike<number>, weights: Float32Array}[]} sets four joints and weights of each vertex, as many sets as the file has
 * @property {THREE.Material} material
 */

const loader = new GLTFLoader();

/** @returns {Promise<Rig>} of a GLB as smpl_jax writes it: its surface in the pose's rest shape, and its posed joints. */
export async function fromGlb(buffer) {
  const { scene } = await loader.parseAsync(buffer, '');
  let mesh;
  scene.traverse((node) => (mesh = node.isSkinnedMesh ? node : mesh));
  if (!mesh) throw new Error('the file holds no rigged body');
  const { bones, boneInverses } = mesh.skeleton;
  return {
    parents: bones.map((bone) => bones.indexOf(bone.parent)),
    places: bones.map((bone) => bone.position.clone()),
    turns: bones.map((bone) => bone.quaternion.clone()),
    skin: { geometry: mesh.geometry, inverses: boneInverses, sets: influences(mesh.geometry.attributes), material: mesh.material },
  };
}

/** The joints and weights of vertices. three.js draws with the first set only and has made its weights sum to 1; here all sets do together. */
function influences(attributes) {
  const further = [];
  for (let n = 1; attributes[`joints_${n}`]; n += 1) {
    further.push({ joints: attributes[`joints_${n}`].array, weights: attributes[`weights_${n}`].array });
  }
  const weights = attributes.skinWeight.array.slice();
  for (let i = 0; i < weights.length; i += 1) {
    const first = i - (i % 4);
    let rest = 1;
    for (const set of further) for (let n = 0; n < 4; n += 1) rest -= set.weights[first + n];
    weights[i] *= rest;
  }
  return [{ joints: attributes.skinIndex.array, weights }, ...further];
}

/** @returns {Rig} of a pose as the server's JSON has it, without a surface. Bones keep the lengths that they have in ``joints``. */
export function fromJson({ axis_angle: angles, joints, parents, frame }) {
  const turn = FRAMES[frame].turn;
  const points = joints.map((joint) => new THREE.Vector3(...joint).applyQuaternion(turn));
  // A body may have other joints than the pose has rotations; the first 22 are the same in all families.
  const known = angles.length === joints.length ? angles.length : 22;
  const turns = joints.map((_, k) => (k < known ? fromAxisAngle(angles[k]) : new THREE.Quaternion()));
  turns[0].premultiply(turn);
  const whole = [];
  const places = parents.map((parent, k) => {
    whole[k] = parent < 0 ? turns[k] : whole[parent].clone().multiply(turns[k]);
    if (parent < 0) return points[k];
    return points[k].clone().sub(points[parent]).applyQuaternion(whole[parent].clone().invert());
  });
  return { parents, places, turns, skin: null };
}

/** @returns {Rig} the same body at rest, as it stands and faces in ``rig``: what a body moves from when there is none before it. */
export function atRest(rig) {
  return { ...rig, turns: rig.turns.map((turn, k) => (k ? new THREE.Quaternion() : turn.clone())) };
}

function fromAxisAngle([x, y, z]) {
  const axis = new THREE.Vector3(x, y, z);
  const angle = axis.length();
  return new THREE.Quaternion().setFromAxisAngle(angle ? axis.divideScalar(angle) : axis.set(1, 0, 0), angle);
}

const BONE = new THREE.CylinderGeometry(0.012, 0.02, 1, 12).translate(0, 0.5, 0);
const JOINT = new THREE.SphereGeometry(0.028, 20, 14);
const UP = new THREE.Vector3(0, 1, 0);

/**
 * A body on the floor, between two rigs of one skeleton: ``mix(a, b, t)`` turns each joint the shortest way (slerp) and moves surface and places
 * along straight lines, so it is exactly ``a`` at 0 and exactly ``b`` at 1. Its origin is on the floor below the root.
 */
export class Figure extends THREE.Group {
  constructor(rig, color) {
    super();
    this.body = new THREE.Group();
    this.add(this.body);
    this.bones = rig.parents.map(() => new THREE.Bone());
    rig.parents.forEach((parent, k) => (parent < 0 ? this.body : this.bones[parent]).add(this.bones[k]));
    this.parents = rig.parents;
    this.globals = rig.parents.map(() => new THREE.Matrix4());
    this.material = rig.skin?.material.clone() ?? new THREE.MeshStandardMaterial({ color, roughness: 0.6 });
    this.mesh = null;
    if (rig.skin) this.#addSkin(rig.skin);
    else this.#addSticks();
    this.mix(rig, rig, 0);
  }

  #addSkin({ geometry, sets }) {
    const own = new THREE.BufferGeometry();
    for (const name of ['position', 'normal']) own.setAttribute(name, geometry.attributes[name].clone());
    if (geometry.attributes.color) own.setAttribute('color', geometry.attributes.color);
    own.setIndex(geometry.index);
    this.sets = sets;
    this.mesh = new THREE.Mesh(own, this.material);
    this.mesh.frustumCulled = false;
    this.mesh.castShadow = true;
    this.body.add(this.mesh);
  }

  #addSticks() {
    this.sticks = this.bones.map((bone, k) => {
      bone.add(this.#part(JOINT));
      if (this.parents[k] < 0) return null;
      const stick = this.#part(BONE);
      this.bones[this.parents[k]].add(stick);
      return stick;
    });
  }

  #part(geometry) {
    const part = new THREE.Mesh(geometry, this.material);
    part.castShadow = true;
    return part;
  }

  /** Whether this figure can stand between the two. */
  fits(...rigs) {
    const vertices = this.mesh?.geometry.attributes.position.count;
    return rigs.every((rig) => rig.parents.length === this.parents.length && (!this.mesh || rig.skin?.geometry.attributes.position.count === vertices));
  }

  mix(a, b, t) {
    const matrix = new THREE.Matrix4();
    this.bones.forEach((bone, k) => {
      bone.position.lerpVectors(a.places[k], b.places[k], t);
      bone.quaternion.slerpQuaternions(a.turns[k], b.turns[k], t);
      if (this.sticks?.[k]) lay(this.sticks[k], bone.position);
      matrix.compose(bone.position, bone.quaternion, bone.scale);
      if (this.parents[k] < 0) this.globals[k].copy(matrix);
      else this.globals[k].multiplyMatrices(this.globals[this.parents[k]], matrix);
    });
    if (this.mesh) this.#skin(a.skin, b.skin, t);
    this.#stand();
  }

  /** Linear blend skinning, here and not on the graphics card: every joint of a vertex counts, and the points are known to the floor. */
  #skin(a, b, t) {
    const matrices = this.globals.map((each, k) => {
      const inverse = new THREE.Matrix4().fromArray(a.inverses[k].elements.map((value, i) => value + (b.inverses[k].elements[i] - value) * t));
      return new THREE.Matrix4().multiplyMatrices(each, inverse).elements;
    });
    const { position, normal } = this.mesh.geometry.attributes;
    // Points are moved by the joints, directions only turned.
    const parts = [[position, 'position', 1], [normal, 'normal', 0]].map(([attribute, name, offset]) => [
      attribute, a.geometry.attributes[name].array, b.geometry.attributes[name].array, offset,
    ]);
    const [blend, rest] = [new Float64Array(12), new Float64Array(3)];
    for (let i = 0; i < position.count; i += 1) {
      blend.fill(0);
      for (const { joints, weights } of this.sets) {
        for (let n = 4 * i; n < 4 * i + 4; n += 1) {
          const weight = weights[n];
          if (weight === 0) continue;
          const m = matrices[joints[n]];
          for (let column = 0; column < 4; column += 1) {
            for (let row = 0; row < 3; row += 1) blend[3 * column + row] += weight * m[4 * column + row];
          }
        }
      }
      for (const [attribute, one, two, offset] of parts) {
        for (let n = 0; n < 3; n += 1) rest[n] = one[3 * i + n] + (two[3 * i + n] - one[3 * i + n]) * t;
        for (let row = 0; row < 3; row += 1) {
          attribute.array[3 * i + row] = blend[row] * rest[0] + blend[3 + row] * rest[1] + blend[6 + row] * rest[2] + blend[9 + row] * offset;
        }
      }
    }
    position.needsUpdate = true;
    normal.needsUpdate = true;
  }

  /** Puts the lowest point on the floor and the root above the origin; measures height and reach. */
  #stand() {
    const points = this.mesh?.geometry.attributes.position.array ?? this.globals.flatMap(({ elements: m }) => [m[12], m[13], m[14]]);
    const root = this.bones[0].position;
    let [low, high, reach] = [Infinity, -Infinity, 0];
    for (let i = 0; i < points.length; i += 3) {
      low = Math.min(low, points[i + 1]);
      high = Math.max(high, points[i + 1]);
      reach = Math.max(reach, Math.hypot(points[i] - root.x, points[i + 2] - root.z));
    }
    const thick = this.mesh ? 0 : 0.03;
    this.height = high - low + 2 * thick;
    this.reach = reach + thick;
    this.body.position.set(-root.x, thick - low, -root.z);
  }

  dispose() {
    this.mesh?.geometry.dispose();
    this.material.dispose();
    this.removeFromParent();
  }
}

function lay(stick, offset) {
  const length = offset.length();
  stick.scale.set(1, Math.max(length, 1e-4), 1);
  if (length) stick.quaternion.setFromUnitVectors(UP, offset.clone().divideScalar(length));
}

/** Three arrows along a frame's axes, at its origin. */
export function axesOf(frame) {
  const group = new THREE.Group();
  const ends = { x: [1, 0, 0, 0xd43d3d], y: [0, 1, 0, 0x2f9e44], z: [0, 0, 1, 0x3b74e0] };
  for (const [name, [x, y, z, color]] of Object.entries(ends)) {
    const axis = new THREE.Vector3(x, y, z);
    const arrow = new THREE.ArrowHelper(axis, new THREE.Vector3(), 0.55, color, 0.09, 0.05);
    for (const part of [arrow.line, arrow.cone]) {
      part.material.depthTest = false;
      part.renderOrder = 2;
    }
    const sign = letter(name, `#${color.toString(16)}`);
    sign.position.copy(axis).multiplyScalar(0.64);
    group.add(arrow, sign);
  }
  group.quaternion.copy(FRAMES[frame].turn);
  return group;
}

function letter(text, color) {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 64;
  const pen = canvas.getContext('2d');
  pen.font = '600 52px system-ui, sans-serif';
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  pen.fillStyle = color;
  pen.fillText(text, 32, 32);
  const texture = new THREE.CanvasTexture(canvas);
  texture.colorSpace = THREE.SRGBColorSpace;
  const sign = new THREE.Sprite(new THREE.SpriteMaterial({ map: texture, depthTest: false }));
  sign.scale.setScalar(0.13);
  sign.renderOrder = 3;
  return sign;
}
