// Draws a talking head: every sample of the picture is shaded by formulas of the identity and of the motion.
//
// face.py puts the structures Identity and Motion (all members float), the enumerations of scenes, clothes and patterns
// and the constant HEAD_CENTER_Y before this text and compiles the whole. The renderer keeps no state between calls, so
// several threads may draw at the same time.
//
// Coordinates: `x` to the right and `y` upwards span -1 .. 1 over the picture. `head_x`, `head_y` are the same plane
// in units of the head, moved and turned so that the head is upright with its centre at 0. The head is an ellipsoid;
// `face_x`, `face_y` name a point of its front, -1 .. 1 from ear to ear and from chin to crown.
//
// A pixel is the mean of 2 x 2 samples. Eight samples of a row are computed at once, in blocks that begin at a
// multiple of eight in the full picture: so a window of the picture has the same bytes as the picture.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// ---------------------------------------------------------------- eight floats at once

constexpr int LANES = 8;
typedef float FloatLanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t HashLanes __attribute__((vector_size(4 * LANES)));
typedef int64_t WideLanes __attribute__((vector_size(4 * LANES)));

struct Float {
  FloatLanes lanes;
  Float() : lanes{} {}
  Float(float value) : lanes(FloatLanes{} + value) {}
  Float(FloatLanes lanes) : lanes(lanes) {}
};

inline Float operator+(Float a, Float b) { return a.lanes + b.lanes; }
inline Float operator-(Float a, Float b) { return a.lanes - b.lanes; }
inline Float operator*(Float a, Float b) { return a.lanes * b.lanes; }
inline Float operator/(Float a, Float b) { return a.lanes / b.lanes; }
inline Float operator-(Float a) { return -a.lanes; }
inline Float min(Float a, Float b) { return Float(a.lanes < b.lanes ? a.lanes : b.lanes); }
inline Float max(Float a, Float b) { return Float(a.lanes > b.lanes ? a.lanes : b.lanes); }
inline Float abs(Float a) { return max(a, -a); }
inline Float square(Float a) { return a * a; }
inline Float clamp(Float a, Float low = 0.f, Float high = 1.f) { return min(max(a, low), high); }
inline Float where_less(Float a, Float b, Float yes, Float no) {
  return Float(a.lanes < b.lanes ? yes.lanes : no.lanes);
}

inline Float sqrt(Float a) {
  Float root;
  for (int i = 0; i < LANES; i++) root.lanes[i] = std::sqrt(std::max(a.lanes[i], 0.f));
  return root;
}

inline bool any_above(Float a, float bound) {
  WideLanes above = (WideLanes)(a.lanes > Float(bound).lanes);
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}

inline IntLanes floor_int(Float a) {
  IntLanes whole = __builtin_convertvector(a.lanes, IntLanes);
  return whole + (__builtin_convertvector(whole, FloatLanes) > a.lanes);
}
inline Float floor(Float a) { return Float(__builtin_convertvector(floor_int(a), FloatLanes)); }

// 0 up to `from`, 1 from `to` on, smooth between; `from` may be the larger one.
inline Float smoothstep(Float from, Float to, Float a) {
  Float t = clamp((a - from) / (to - from));
  return t * t * (3.f - 2.f * t);
}

// exp(-a) for a >= 0 to about 0.01, and exactly 0 from a = 16 on.
inline Float exp_minus(Float a) {
  Float t = max(1.f - a * (1 / 16.f), 0.f);
  return square(square(square(square(t))));
}
inline Float gaussian(Float a, Float width) { return exp_minus(square(a / width)); }
inline Float gaussian(Float a, Float b, Float width_a, Float width_b) {
  return exp_minus(square(a / width_a) + square(b / width_b));
}

// sin(a) to about 0.002.
inline Float sine(Float a) {
  a = a * 0.15915494f;
  a = a - floor(a + 0.5f);
  Float wave = 8.f * a * (1.f - 2.f * abs(a));
  return wave * (0.775f + 0.225f * abs(wave));
}

// The angle of (x, y) in quarter turns, 0 .. 4, counted from the x axis, on a square instead of a circle.
inline Float quarter_turns(Float x, Float y) {
  Float p = x / (abs(x) + abs(y) + 1e-6f);
  return where_less(y, 0.f, 3.f + p, 1.f - p);
}

inline Float hash(HashLanes a, HashLanes b) {
  HashLanes h = a * 374761393u + b * 668265263u;
  h = (h ^ (h >> 13)) * 1274126177u;
  IntLanes bits = (IntLanes)((h ^ (h >> 16)) & 65535u);
  return Float(__builtin_convertvector(bits, FloatLanes)) * (1 / 32767.5f) - 1.f;
}

// Smooth noise in -1 .. 1: random values at whole numbers, smooth between.
inline Float value_noise(Float x, Float y) {
  IntLanes whole_x = floor_int(x), whole_y = floor_int(y);
  Float u = x - Float(__builtin_convertvector(whole_x, FloatLanes));
  Float v = y - Float(__builtin_convertvector(whole_y, FloatLanes));
  u = u * u * (3.f - 2.f * u);
  v = v * v * (3.f - 2.f * v);
  HashLanes a = (HashLanes)whole_x, b = (HashLanes)whole_y;
  Float low = hash(a, b), low_right = hash(a + 1u, b), high = hash(a, b + 1u), high_right = hash(a + 1u, b + 1u);
  low = low + (low_right - low) * u;
  high = high + (high_right - high) * u;
  return low + (high - low) * v;
}
inline Float value_noise(Float x) {
  IntLanes whole = floor_int(x);
  Float u = x - Float(__builtin_convertvector(whole, FloatLanes));
  u = u * u * (3.f - 2.f * u);
  HashLanes a = (HashLanes)whole;
  Float left = hash(a, a ^ 77u), right = hash(a + 1u, (a + 1u) ^ 77u);
  return left + (right - left) * u;
}

// The same for one number.
inline float clamp(float a, float low = 0, float high = 1) { return std::min(std::max(a, low), high); }
inline float square(float a) { return a * a; }
inline float smoothstep(float from, float to, float a) {
  float t = clamp((a - from) / (to - from));
  return t * t * (3 - 2 * t);
}

// ---------------------------------------------------------------- colours, linear light

struct Color {
  Float red, green, blue;
  Color() = default;
  Color(Float red, Float green, Float blue) : red(red), green(green), blue(blue) {}
  explicit Color(const float* rgb) : red(rgb[0]), green(rgb[1]), blue(rgb[2]) {}
};

inline Color operator*(Color c, Float s) { return {c.red * s, c.green * s, c.blue * s}; }
inline Color operator*(Color a, Color b) { return {a.red * b.red, a.green * b.green, a.blue * b.blue}; }
inline Color operator+(Color a, Color b) { return {a.red + b.red, a.green + b.green, a.blue + b.blue}; }
inline Color operator+(Color c, Float s) { return {c.red + s, c.green + s, c.blue + s}; }
inline Color mix(Color a, Color b, Float share) {
  return {a.red + (b.red - a.red) * share, a.green + (b.green - a.green) * share, a.blue + (b.blue - a.blue) * share};
}

// Random smooth colours at three scales that an albedo is multiplied with; 1 where the identity has no texture.
Color texture(const Identity& identity, Color albedo, Float x, Float y, float seed) {
  if (identity.textured == 0) return albedo;
  Color factor = {1.f, 1.f, 1.f};
  for (int i = 0; i < 3; i++) {
    float cosine = std::cos(0.4f + i), sine = std::sin(0.4f + i), scale = identity.texture_scale[i];
    Float turned_x = cosine * x + sine * y, turned_y = cosine * y - sine * x;  // hides the lattice of the noise
    Float noise = value_noise(turned_x * scale + (seed + 13 * i), turned_y * scale + (7 * seed + i));
    factor = factor + Color(identity.texture_color + 3 * i) * noise;
  }
  return albedo * Color(max(factor.red, 0.1f), max(factor.green, 0.1f), max(factor.blue, 0.1f));
}

// ---------------------------------------------------------------- what one frame needs

struct Frame {
  const Identity& identity;
  const Motion& motion;
  float sample;          // width of a sample in the picture's units
  float blur;            // half the width of a contour of the mouth, in face_y
  float rotation[3][3];  // from head to view
  float roll_cosine, roll_sine;
  float center_x, center_y;     // the head's centre in the picture
  float light[3], half_way[3];  // unit vectors to the key light, and between it and the viewer
  float light_side;             // 1 if the key light comes from the right
  Color light_color;
  float opening;   // of the mouth after closure, 0 .. 1
  float jaw_drop;  // how far the chin goes down, in units of the head
  float mouth_half_width, smile;
  float lip_upper, lip_lower;  // thickness of the lips
  float tuck, tongue_lift;     // lower lip under the teeth and lifted tip of the tongue, after closure
  float gap_upper, gap_lower;  // distance of the inner contours from the resting line
  float neck_half_width;
};

// Sets the shape of the mouth. Pressed lips take everything else back: a closed mouth hides teeth and tongue.
void shape_mouth(Frame& f) {
  const Identity& identity = f.identity;
  const Motion& motion = f.motion;
  float open = motion.open, wide = motion.wide, round = motion.round, close = motion.close;
  float tuck = f.tuck = motion.lip_teeth * (1 - close), tongue = f.tongue_lift = motion.tongue * (1 - close);
  f.opening = open * (1 - close);
  f.jaw_drop = 0.088f * f.opening + 0.012f * tongue - 0.012f * close - 0.014f * tuck;
  f.mouth_half_width =
      identity.mouth_width * (1 + 0.38f * wide + 0.05f * motion.smile) * (1 - 0.48f * round) * (1 - 0.10f * f.opening);
  f.smile = 0.15f + motion.smile + 0.12f * wide;
  f.lip_upper = identity.lip_upper * (1 - 0.62f * close) * (1 + 0.45f * round) * (1 - 0.32f * wide);
  f.lip_lower =
      identity.lip_lower * (1 - 0.62f * close) * (1 + 0.40f * round) * (1 - 0.32f * wide) * (1 - 0.62f * tuck);
  f.gap_upper =
      0.004f + (0.032f * open + 0.022f * wide + 0.018f * round + 0.046f * tuck + 0.010f * tongue) * (1 - close);
  f.gap_lower = 0.004f + (0.118f * open * (1 - 0.7f * tuck) + 0.016f * wide + 0.036f * round +
                          0.062f * tongue * (1 - open) + 0.022f * tuck) *
                             (1 - close);
  f.gap_upper *= 1 - 0.9f * close;
  f.gap_lower *= 1 - 0.9f * close;
}

Frame make_frame(const Identity& identity, const Motion& motion, int size) {
  Frame f{identity, motion};
  f.sample = 1.f / size;
  f.blur = 2.2f * f.sample / identity.head_height;
  float yaw_c = std::cos(motion.yaw), yaw_s = std::sin(motion.yaw);
  float pitch_c = std::cos(motion.pitch), pitch_s = std::sin(motion.pitch);
  float rotation[3][3] = {
      {yaw_c, yaw_s * pitch_s, yaw_s * pitch_c}, {0, pitch_c, -pitch_s}, {-yaw_s, yaw_c * pitch_s, yaw_c * pitch_c}};
  std::copy(&rotation[0][0], &rotation[0][0] + 9, &f.rotation[0][0]);
  f.roll_cosine = std::cos(motion.roll);
  f.roll_sine = std::sin(motion.roll);
  f.center_x = identity.offset_x + motion.shift_x;
  f.center_y = HEAD_CENTER_Y + identity.offset_y + motion.shift_y;

  float length = std::sqrt(identity.light_x * identity.light_x + identity.light_y * identity.light_y + 0.5625f);
  f.light[0] = identity.light_x / length;
  f.light[1] = identity.light_y / length;
  f.light[2] = 0.75f / length;
  float half_length = std::sqrt(2 + 2 * f.light[2]);
  for (int i = 0; i < 3; i++) f.half_way[i] = (f.light[i] + (i == 2)) / half_length;
  f.light_side = identity.light_x > 0 ? 1.f : -1.f;
  f.light_color = Color(1 + identity.light_warmth, 1.f, 1 - identity.light_warmth);

  shape_mouth(f);
  f.neck_half_width = identity.neck_width * identity.head_width * identity.scale;
  return f;
}

// A block of samples: where they are, in the picture and in the head's plane.
struct Place {
  Float x, y, head_x, head_y;
};

Place place_of(const Frame& f, Float x, Float y) {
  constexpr float neck = 0.5f;  // the head rolls about a point this far below its centre
  Float moved_x = (x - f.center_x) / f.identity.scale, moved_y = (y - f.center_y) / f.identity.scale + neck;
  return {x, y, f.roll_cosine * moved_x + f.roll_sine * moved_y,
          f.roll_cosine * moved_y - f.roll_sine * moved_x - neck};
}

// Light that a surface gives back. `facing` is the wrapped cosine to the key light, `shade` takes off both lights.
Color lit(const Frame& f, Color albedo, Float facing, Float shade, float ambient = 0.28f) {
  Float soft = sqrt(facing);  // the skin lets red light through: its shadows begin later and are warmer
  float key = 0.92f * f.identity.light_key;
  Color light = {(facing * 0.74f + soft * 0.26f) * key + ambient, (facing * 0.9f + soft * 0.1f) * key + ambient,
                 facing * key + ambient * 1.04f};
  return albedo * f.light_color * light * shade;
}

// The wrapped cosine between a unit normal and the key light, 0 .. 1.
Float facing_light(const Frame& f, Float x, Float y, Float z) {
  return clamp((x * f.light[0] + y * f.light[1] + z * f.light[2] + 0.35f) / 1.35f);
}

// ---------------------------------------------------------------- geometry of the head

// Where the ray through a point of the head's plane hits an ellipsoid that turns with the head.
struct Hit {
  Float inside;   // about 1 - r^2 in the plane: positive inside the silhouette
  Float depth;    // towards the viewer
  Float x, y, z;  // the point in the head's own axes
};

Hit hit_ellipsoid(const Frame& f, Float x, Float y, Float half_x, Float half_y, Float half_z) {
  const Float half[3] = {half_x, half_y, half_z};
  Float start[3], step[3], a = 0.f, b = 0.f, c = -1.f;
  for (int i = 0; i < 3; i++) {
    start[i] = (f.rotation[0][i] * x + f.rotation[1][i] * y) / half[i];
    step[i] = f.rotation[2][i] / half[i];
    a = a + step[i] * step[i];
    b = b + start[i] * step[i];
    c = c + start[i] * start[i];
  }
  Hit hit;
  hit.inside = (b * b - a * c) / a;
  hit.depth = (sqrt(max(hit.inside, 0.f) * a + 1e-7f) - b) / a;
  hit.x = (start[0] + step[0] * hit.depth) * half[0];
  hit.y = (start[1] + step[1] * hit.depth) * half[1];
  hit.z = (start[2] + step[2] * hit.depth) * half[2];
  return hit;
}

// The contours of the mouth above and below a point, and how much of the point belongs to what.
struct Mouth {
  Float across;                    // -1 .. 1 from corner to corner
  Float upper_inner, lower_inner;  // face_y of the contours
  Float upper_outer, lower_outer;
  Float resting;                 // face_y of the closed mouth's line
  Float inside, lips, is_upper;  // coverage 0 .. 1
};

Mouth mouth_at(const Frame& f, Float face_x, Float face_y) {
  const Identity& identity = f.identity;
  Mouth m;
  m.across = clamp(face_x / f.mouth_half_width, -1.4f, 1.4f);
  Float s2 = square(m.across), rest = max(1.f - s2, 0.f);
  Float root = sqrt(rest), root4 = sqrt(root);
  m.resting = identity.mouth_y + f.smile * (0.045f * s2 - 0.012f) - 0.008f * (1.f - s2) - 0.032f * f.opening * s2;
  m.upper_inner = m.resting + f.gap_upper * root * root4;
  m.lower_inner = m.resting - f.gap_lower * root;
  Float bow = 1.f - 0.24f * (1 - 0.6f * f.motion.round) * gaussian(m.across, 0.17f) - 0.25f * s2;
  m.upper_outer = m.upper_inner + f.lip_upper * root * bow;
  m.lower_outer = m.lower_inner - f.lip_lower * root * (1.f - 0.15f * s2);
  Float reach = abs(m.across);
  m.inside = smoothstep(-f.blur, f.blur, m.upper_inner - face_y) * smoothstep(-f.blur, f.blur, face_y - m.lower_inner) *
             smoothstep(1.f, 0.94f, reach) * smoothstep(0.004f, 0.020f, m.upper_inner - m.lower_inner);
  m.lips = smoothstep(-f.blur, f.blur, m.upper_outer - face_y) * smoothstep(-f.blur, f.blur, face_y - m.lower_outer) *
           smoothstep(1.06f, 0.97f, reach);
  m.is_upper = smoothstep(-0.006f, 0.006f, face_y - (m.upper_inner + m.lower_inner) * 0.5f);
  return m;
}

// How far the skin lies above the ellipsoid: nose, eye sockets, brow ridge, cheeks, chin, mound of the mouth.
Float relief(const Frame& f, Float x, Float y) {
  const Identity& identity = f.identity;
  Float side = abs(x);
  float width = identity.nose_width, bottom = identity.nose_bottom, nose = identity.nose_height;
  Float bridge = smoothstep(0.16f, bottom + 0.02f, y) * smoothstep(bottom - 0.10f, bottom + 0.03f, y);
  Float h = 0.110f * nose * bridge * gaussian(x, 0.085f + 0.05f * bridge);
  h = h + 0.100f * nose * gaussian(x, y - bottom, 0.11f * width, 0.080f);
  h = h + 0.040f * nose * gaussian(side - 0.130f * width, y - bottom + 0.035f, 0.060f, 0.05f);
  h = h - 0.062f * gaussian(side - identity.eye_x + 0.03f, y - identity.eye_y - 0.02f, 0.20f, 0.13f);
  h = h + 0.020f * identity.brow_ridge * gaussian(side - 0.34f, y - identity.brow_y - identity.eye_y, 0.26f, 0.07f);
  h = h + (0.034f * identity.cheeks + 0.022f * f.motion.smile) * gaussian(side - 0.50f, y + 0.28f, 0.24f, 0.20f);
  h = h + 0.035f * gaussian(x, y + 0.92f, 0.20f, 0.11f);
  h = h - 0.020f * gaussian(x, y - identity.mouth_y + 0.175f, 0.22f, 0.06f);
  h = h + (0.034f + 0.040f * f.motion.round) * gaussian(x, y - identity.mouth_y, 0.28f, 0.14f);
  h = h - 0.012f * gaussian(side - f.mouth_half_width - 0.06f, y - identity.mouth_y, 0.07f, 0.09f);
  return h - 0.012f * gaussian(x, y - identity.mouth_y - 0.15f, 0.035f, 0.07f);
}

// Factor of the ellipsoid's width at a height of the face: temples, cheekbones, jaw and chin of this identity.
Float outline(const Identity& identity, Float y) {
  Float jaw = smoothstep(-0.05f, -0.60f, y), chin = smoothstep(-0.58f, -1.0f, y);
  return 1.f - (1 - identity.jaw_width) * jaw - (1 - identity.chin_width) * chin + 0.10f * smoothstep(0.25f, 0.95f, y);
}

// What the shading of the head needs to know of a block of samples.
struct Surface {
  Float inside, depth, x, y, front;  // front: z of the point over the head's depth
};

Surface surface_at(const Frame& f, const Place& place) {
  const Identity& identity = f.identity;
  float mouth = identity.mouth_y * identity.head_height;
  Float below = smoothstep(mouth + 0.02f, mouth - 0.22f, place.head_y);
  Float y = place.head_y + f.jaw_drop * below;
  Float width = outline(identity, y * (1 / identity.head_height));
  Hit hit = hit_ellipsoid(f, place.head_x / width, y, identity.head_width, identity.head_height, identity.head_depth);
  Surface s;
  s.inside = hit.inside;
  s.depth = hit.depth;
  s.x = hit.x / identity.head_width;
  s.y = hit.y / identity.head_height;
  s.front = hit.z / identity.head_depth;
  if (!any_above(hit.inside, -0.25f)) return s;
  Float h = relief(f, s.x, s.y);
  s.x = s.x - h * (f.rotation[0][2] / identity.head_width) * smoothstep(0.f, 0.5f, s.front);
  s.y = s.y + h * (-f.rotation[1][2] / identity.head_height);
  h = relief(f, s.x, s.y);
  if (any_above(0.30f - abs(s.y - identity.mouth_y), 0.f)) {
    Mouth m = mouth_at(f, s.x, s.y);
    Float upper = (m.upper_inner + m.upper_outer) * 0.5f, lower = (m.lower_inner + m.lower_outer) * 0.5f;
    h = h + m.lips * (1.f - m.inside) *
                (0.018f * gaussian(s.y - upper, f.lip_upper * 0.6f + 0.006f) +
                 0.028f * gaussian(s.y - lower, f.lip_lower * 0.6f + 0.006f));
  }
  s.depth = s.depth + h * f.rotation[2][2];
  return s;
}

// ---------------------------------------------------------------- behind the head

// A bright window with soft panes.
Color draw_window(const Identity& identity, Color light, Float x, Float y, Color image) {
  const float* random = identity.background;
  float middle = 1.6f * random[1] - 0.8f;
  Float pane = smoothstep(0.46f, 0.34f, abs(x - middle)) * smoothstep(-0.45f, -0.25f, y) * smoothstep(1.05f, 0.9f, y);
  Float bar = max(gaussian(x - middle, 0.035f), gaussian(y - 0.25f, 0.035f));
  Color outside = mix(Color(0.55f, 0.62f, 0.50f), Color(0.80f, 0.90f, 1.0f), smoothstep(-0.3f, 0.6f, y));
  return mix(image, outside * light * (0.55f + 0.35f * random[2]), pane * (1.f - 0.7f * bar) * 0.85f);
}

// Shelves with books.
Color draw_shelves(const Identity& identity, Float x, Float y, Color image) {
  Color wall = Color(identity.wall), second = Color(identity.wall_second);
  Float level = y * 1.6f + identity.background[1], row = floor(level), height = level - row;
  Float column = x * 7.f + 0.9f * value_noise(x * 5.f, row) + 3.f * row, place = column - floor(column);
  Float tone = value_noise(floor(column) * 1.7f, row * 3.1f);
  Color book = mix(wall * 0.55f, second * 1.15f, tone * 0.5f + 0.5f) + Color(0.10f, 0.02f, -0.02f) * max(tone, 0.f);
  Float spine = smoothstep(0.f, 0.25f, place) * smoothstep(1.f, 0.75f, place);
  Float filled = smoothstep(0.08f, 0.16f, height) * smoothstep(0.78f + 0.1f * tone, 0.66f + 0.1f * tone, height);
  image = mix(image, book * (0.55f + 0.35f * spine), filled * 0.75f);
  return image * (1.f - 0.35f * gaussian(height - 0.04f, 0.06f));
}

// A plant out of focus at one side.
Color draw_plant(const Identity& identity, Color light, Float x, Float y, Color image) {
  const float* random = identity.background;
  float middle = random[1] < 0.5f ? -0.8f : 0.8f;
  Float leaves =
      value_noise(x * 4.f + 9.f * random[2], y * 3.f) + 0.5f * value_noise(x * 9.f, y * 7.f + 5.f * random[3]);
  Float near = gaussian(x - middle, y + 0.15f, 0.42f, 0.75f);
  Color leaf = mix(Color(0.05f, 0.12f, 0.05f), Color(0.22f, 0.36f, 0.12f), clamp(leaves * 0.5f + 0.5f));
  return mix(image, leaf * light, smoothstep(0.25f, 0.75f, near + 0.30f * leaves));
}

// A wall with what stands before it and with lamps out of focus; darker towards the corners.
Color draw_background(const Identity& identity, Float x, Float y) {
  const float* random = identity.background;
  Color second = Color(identity.wall_second), light = {1 + identity.light_warmth, 1.f, 1 - identity.light_warmth};
  Float slope = (y * (1.2f * random[0] - 0.3f) + x * (1.3f * random[0] - 0.65f)) * 0.5f + 0.5f;
  Color image = mix(Color(identity.wall), second, clamp(slope));
  if (identity.scene == WINDOW) image = draw_window(identity, light, x, y, image);
  if (identity.scene == SHELVES) image = draw_shelves(identity, x, y, image);
  if (identity.scene == PLANT) image = draw_plant(identity, light, x, y, image);
  bool plain = identity.scene == WALL;
  for (int i = 0; i < 4; i++) {
    const float* lamp = random + 4 + 4 * i;
    Float away = sqrt(square(x - (lamp[0] * 2.2f - 1.1f)) + square(y - (lamp[1] * 1.6f - 0.5f)));
    float radius = 0.10f + 0.30f * lamp[2], soft = plain ? 0.05f + 0.12f * lamp[3] : 0.14f;
    Float disc = smoothstep(radius + soft, radius - soft, away);
    image = mix(image, second * 0.6f + light * 0.5f, disc * (plain ? 0.08f + 0.22f * lamp[3] : 0.10f * lamp[3]));
  }
  return texture(identity, image * (1.f - 0.22f * (x * x + y * y)), x, y, 3.f);
}

// Brightness of hair along its strands, about 0.2 .. 1.2. `across` counts locks, `along` follows them. Cut hair lies in
// `layers` per unit of `along`: the tips of each cast a shadow on the roots of the next.
Float strands(Float across, Float along, float seed, float layers = 0) {
  Float shadow = 1.f;
  if (layers > 0) {
    Float row = along * layers + 0.9f * value_noise(across * 1.3f + seed, along * 0.5f), layer = floor(row);
    across = across + 0.5f * value_noise(layer * 1.7f + seed) + 0.25f * (row - layer) * value_noise(layer * 2.3f);
    shadow = 0.74f + 0.36f * smoothstep(0.f, 0.5f, row - layer);
  }
  Float bent = across + 0.45f * value_noise(across * 0.6f + seed, along * 1.3f);
  Float in_lock = bent - floor(bent);
  Float gap = square(square(2.f * in_lock - 1.f));
  Float tone = value_noise(floor(bent) * 1.37f + seed, along * 0.7f);
  Float fine = value_noise(bent * 4.3f, along * 2.2f + seed) + 0.6f * value_noise(bent * 9.1f + seed, along * 3.0f);
  return (0.74f + 0.15f * tone + 0.17f * fine - 0.26f * gap) * shadow;
}

// Brightness of curls, about 0.2 .. 1.2.
Float curls(Float x, Float y, float seed) {
  Float bent_x = x + 0.05f * value_noise(x * 8.f, y * 8.f + seed),
        bent_y = y + 0.05f * value_noise(x * 8.f + seed, y * 8.f);
  Float turned_x = 0.8f * bent_x + 0.6f * bent_y, turned_y = 0.8f * bent_y - 0.6f * bent_x;
  Float coarse = value_noise(bent_x * 9.f + seed, bent_y * 9.f),
        fine = value_noise(turned_x * 21.f, turned_y * 21.f + seed);
  Float ring = abs(value_noise(turned_x * 13.f + seed, turned_y * 13.f + 5.f));
  return 0.52f + 0.28f * coarse + 0.24f * fine + 0.34f * ring;
}

// Sideways shift of wavy hair at a height.
Float hair_wave(const Identity& identity, Float y) {
  return identity.hair_wave *
         (0.035f * sine(y * 11.f + identity.phase[0]) + 0.020f * sine(y * 23.f + identity.phase[1]));
}

// The shade of `strands`, or of `curls` where the hair is curly.
Float curled(const Identity& identity, Float shade, Float x, Float y) {
  if (identity.hair_curl == 0) return shade;
  return shade + (curls(x, y, identity.phase[4]) - shade) * identity.hair_curl;
}

// Hair behind the neck and the shoulders.
void draw_back_hair(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  if (identity.hair_length == 0) return;
  const float* phase = identity.phase;
  Float x = place.head_x + 0.18f * f.rotation[0][2], y = place.head_y;  // it lies behind the axis of the head
  Float above = max(y, 0.f) / (identity.head_height + identity.hair_top), down = smoothstep(0.05f, -0.75f, y);
  Float lock =
      0.020f * value_noise(y * 6.f + phase[2], x * 2.f) + identity.hair_curl * 0.05f * value_noise(y * 11.f, x * 3.f);
  Float edge = (identity.head_width + identity.hair_side + 0.01f) * sqrt(max(1.f - above * above, 0.f)) +
               identity.hair_flare * down + hair_wave(identity, y) * where_less(x, 0.f, -1.f, 1.f) + lock;
  Float across = x * (9.f - 2.f * down) + identity.hair_wave * 0.8f * sine(y * 10.f + phase[0]);
  Float tips = 0.05f * value_noise(across * 1.7f, 2.f) + 0.03f * value_noise(across * 4.f, 5.f);
  Float cover = smoothstep(-0.012f, 0.012f, edge - abs(x)) *
                smoothstep(-0.02f, 0.02f, y + identity.hair_length + tips) * smoothstep(0.55f, 0.35f, y);
  if (!any_above(cover, 0.f)) return;
  Color hair = texture(identity, Color(identity.hair), x * 1.3f, y * 1.3f, 1.f);
  Float facing = facing_light(f, clamp(x * 1.4f, -0.9f, 0.9f), 0.2f, 0.6f);
  Float shade = curled(identity, strands(across, y * 1.6f, phase[3]), x, y);
  Float hollow = 0.45f + 0.55f * smoothstep(0.75f, 1.0f, abs(x) / edge);  // darker beside the neck
  image = mix(image, hair * ((0.25f + 0.75f * facing) * shade * hollow), cover);
}

// A bun on top of the head.
void draw_bun(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  if (identity.bun == 0) return;
  const float* phase = identity.phase;
  float middle_x = identity.bun_x - 0.08f * f.rotation[0][2];
  float middle_y = identity.head_height + identity.hair_top + 0.35f * identity.bun - 0.2f * f.motion.pitch;
  Float dx = (place.head_x - middle_x) / identity.bun, dy = (place.head_y - middle_y) / identity.bun;
  Float turn = quarter_turns(dx, dy), r2 = dx * dx + dy * dy;
  Float cover = smoothstep(1.06f, 0.92f, r2 + 0.10f * value_noise(turn * 5.f, phase[5]));
  if (!any_above(cover, 0.f)) return;
  Color hair = texture(identity, Color(identity.hair), place.head_x * 1.3f, place.head_y * 1.3f, 1.f);
  Float facing = facing_light(f, dx, dy, sqrt(max(1.f - r2, 0.05f)));
  Float shade = strands(dx * 2.5f + dy * 2.f + r2 * 1.5f, turn, phase[6]);
  image = mix(image, hair * ((0.2f + 0.9f * facing) * shade), cover);
}

void draw_neck(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  Float x = place.x - f.center_x * 0.8f, y = place.y;
  Float half = f.neck_half_width * (1.f + 0.10f * smoothstep(-0.50f, -0.80f, y));
  Float cover =
      smoothstep(-1.2f * f.sample, 1.2f * f.sample, half - abs(x)) * smoothstep(0.02f, -0.06f, y - f.center_y);
  if (!any_above(cover, 0.f)) return;
  Float across = clamp(x / half, -0.98f, 0.98f);
  Float facing = facing_light(f, across, 0.1f, sqrt(1.f - across * across));
  float chin = f.center_y - (identity.head_height + f.jaw_drop) * identity.scale - 0.2f * f.motion.pitch;
  Float shade = 1.f - 0.60f * smoothstep(chin - 0.26f, chin - 0.01f, y + 0.12f * across * across);
  shade = shade * (1.f - 0.16f * gaussian(abs(across) - 0.45f - 0.3f * (y + 0.8f), 0.10f));
  shade = shade * (1.f - 0.10f * identity.wrinkles * smoothstep(0.5f, 1.f, sine(y * 55.f + across * across * 2.f)));
  Color skin = texture(identity, Color(identity.skin), x * 2.f, y * 1.5f, 0.f);
  image = mix(image, lit(f, skin * Color(0.97f, 0.92f, 0.90f), facing, shade), cover);
}

// Where there is cloth (positive) and where the neckline is open (negative), for a point of the body.
Float neckline(const Frame& f, Float x, Float y) {
  float neck = f.neck_half_width, clothes = f.identity.clothes_kind;
  if (clothes == CREW_NECK || clothes == HOOD) return x * x / square(neck + 0.07f) + square((y + 0.62f) / 0.20f) - 1.f;
  if (clothes == ROLL_NECK) return 1.f - 2.f * smoothstep(-0.015f, 0.015f, y + 0.66f - 0.05f * square(x / neck));
  bool deep = clothes == V_NECK;
  return abs(x) / (neck + (deep ? 0.08f : 0.03f)) + (-y - 0.62f) / (deep ? 0.36f : 0.26f) - 1.f;
}

// The cloth with its pattern, unlit.
Color cloth_albedo(const Identity& identity, Float x, Float y) {
  Color cloth = Color(identity.clothes), second = Color(identity.clothes_second);
  float pattern = identity.clothes_pattern;
  if (pattern == STRIPES) cloth = mix(cloth, second, smoothstep(-0.2f, 0.2f, sine(y * 70.f + 3.f * x * x)) * 0.8f);
  if (pattern == CHECKS) {
    cloth = mix(cloth, second, smoothstep(0.3f, 0.7f, sine(x * 42.f)) * 0.4f);
    cloth = mix(cloth, second, smoothstep(0.3f, 0.7f, sine(y * 42.f)) * 0.4f);
  }
  if (pattern == KNITTED) cloth = cloth * (0.88f + 0.14f * sine(x * 90.f + 2.f * sine(y * 40.f)));
  return texture(identity, cloth, x * 1.5f, y * 1.5f, 2.f);
}

// The two points of a collar; a jacket's collar is a shirt's in another colour, with the lapel beside it.
Color draw_collar(const Frame& f, Float x, Float y, Float outside, Color cloth, Float facing, Color image) {
  bool jacket = f.identity.clothes_kind == JACKET;
  Float collar = smoothstep(0.f, 0.06f, outside) * smoothstep(0.46f, 0.38f, outside + 0.5f * max(-y - 0.86f, 0.f));
  Color linen = jacket ? Color(f.identity.clothes_second) * 0.4f + 0.5f : cloth * 1.15f + 0.03f;
  image = mix(image, lit(f, linen, clamp(facing + 0.08f), 1.f - 0.35f * smoothstep(0.10f, 0.f, outside)), collar);
  image = image * (1.f - 0.35f * gaussian(outside - 0.46f, 0.05f));
  if (jacket) return image * (1.f - 0.40f * gaussian(outside - 0.62f - 0.3f * (y + 0.8f), 0.03f));
  return image * (1.f - 0.30f * gaussian(x, 0.008f) * smoothstep(-0.86f, -0.90f, y));
}

// A hood that lies on the shoulders, and its two cords.
Color draw_hood(const Frame& f, Float x, Float y, Float outside, Color cloth, Float facing, Color image) {
  Float hood = smoothstep(0.f, 0.10f, outside) * smoothstep(0.95f, 0.80f, outside);
  image = mix(image, lit(f, cloth * 1.12f, clamp(facing + 0.15f * sine(outside * 5.f)), 1.f), hood * 0.8f);
  image = image * (1.f - 0.40f * gaussian(outside - 0.92f, 0.07f));
  Float cord = gaussian(abs(x) - 0.14f - 0.03f * (y + 0.9f), 0.012f) * smoothstep(0.1f, 0.2f, outside);
  return mix(image, lit(f, Color(0.75f, 0.74f, 0.72f), facing, 1.f), cord);
}

// Shoulders, the skin below the neck, and clothes.
void draw_body(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  const float* phase = identity.phase;
  float neck = f.neck_half_width, clothes = identity.clothes_kind;
  Float x = place.x - f.center_x * 0.55f, y = place.y - f.motion.breath * 0.014f, side = abs(x);
  Float top = identity.shoulder_y - 0.20f * max(side - neck, 0.f) - 0.55f * square(max(side - 0.60f, 0.f)) +
              0.13f * square(smoothstep(neck + 0.26f, neck - 0.02f, side));
  Float cover = smoothstep(-1.2f * f.sample, 1.2f * f.sample, top - y);
  if (!any_above(cover, 0.f)) return;
  Float across = clamp(x * 0.85f, -0.95f, 0.95f);
  Float facing = facing_light(f, across, 0.35f, sqrt(1.f - across * across) * 0.95f);

  Color skin = texture(identity, Color(identity.skin), x * 2.f, y * 1.5f, 0.f);
  Float collarbone = gaussian(side - 0.16f, y + 0.86f - 0.1f * side, 0.14f, 0.02f);
  Float chest = 1.f - 0.40f * smoothstep(-0.98f, -0.66f, y) - 0.12f * collarbone;
  Float below_neck = max(smoothstep(-0.70f, -0.88f, y), smoothstep(neck - 0.06f, neck + 0.02f, side));
  image = mix(image, lit(f, skin, facing, chest), cover * smoothstep(neck + 0.30f, neck + 0.10f, side) * below_neck);

  Float outside = neckline(f, x, y);
  Color albedo = cloth_albedo(identity, x, y);
  Float fold =
      0.06f * value_noise(x * 5.f + phase[7], y * 4.f + x * 3.f) + 0.03f * sine(x * 17.f - y * 11.f + phase[8]);
  Float chin_shadow = smoothstep(0.30f, 0.f, outside) * smoothstep(-0.98f, -0.70f, y);
  Color cloth = lit(f, albedo, clamp(facing + fold), 1.f - 0.28f * chin_shadow);
  if (clothes == CREW_NECK) {
    Float band = smoothstep(0.f, 0.05f, outside) * smoothstep(0.28f, 0.2f, outside);
    cloth = mix(cloth, lit(f, albedo * 0.75f, facing, 1.f), band * 0.7f);
  }
  if (clothes == SHIRT || clothes == JACKET) cloth = draw_collar(f, x, y, outside, albedo, facing, cloth);
  if (clothes == HOOD) cloth = draw_hood(f, x, y, outside, albedo, facing, cloth);
  if (clothes == ROLL_NECK) {
    Float roll = gaussian(y + 0.80f + 0.10f * across * across, 0.02f) * smoothstep(neck + 0.12f, neck, side);
    cloth = cloth * (1.f - 0.30f * roll);
  }
  image = mix(image, cloth, cover * smoothstep(-0.02f, 0.04f, outside));
}

// Long hair that falls over the shoulders, on both sides of the neck, or as a tail on one side.
void draw_front_locks(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  if (identity.hair_front == 0 && identity.tail == 0) return;
  const float* phase = identity.phase;
  Float x = place.head_x + 0.05f * f.rotation[0][2], y = place.head_y, side = abs(x);
  Float outer, inner;
  if (identity.tail != 0) {
    side = x * (identity.tail > 0 ? 1.f : -1.f);
    Float middle =
        identity.head_width * (0.62f + 0.36f * smoothstep(-0.15f, -0.62f, y)) + 0.03f * sine(y * 6.f + phase[7]);
    Float half = std::fabs(identity.tail) * (0.75f + 0.25f * sine(y * 3.f + 2.5f)) * smoothstep(-1.30f, -0.80f, y);
    outer = middle + half + 0.02f * value_noise(y * 8.f, 1.f);
    inner = middle - half + 0.02f * value_noise(y * 9.f, 2.f);
  } else {
    Float wave = hair_wave(identity, y);
    outer = identity.head_width + identity.hair_side + identity.hair_flare * smoothstep(0.05f, -0.75f, y) + 0.5f * wave;
    inner = outer - identity.hair_front - 0.04f * value_noise(y * 5.f + phase[4], where_less(x, 0.f, 1.f, 2.f)) + wave;
  }
  Float cover = smoothstep(-0.012f, 0.012f, outer - side) * smoothstep(-0.015f, 0.015f, side - inner) *
                smoothstep(0.08f, -0.05f, y) *
                smoothstep(-0.02f, 0.02f,
                           y + (identity.tail != 0 ? 1.3f : identity.hair_length - 0.04f) +
                               0.05f * value_noise(x * 17.f, phase[5]));
  if (!any_above(cover, 0.f)) return;
  Color hair = texture(identity, Color(identity.hair), x * 1.3f, y * 1.3f, 1.f);
  Float shade =
      strands((side - inner) * 13.f + identity.hair_wave * 0.8f * sine(y * 10.f + phase[0]), y * 1.6f, phase[9]);
  shade = shade * (0.70f + 0.30f * smoothstep(0.f, 0.05f, side - inner) * smoothstep(0.f, 0.05f, outer - side));
  shade = curled(identity, shade, x, y);
  Float facing = facing_light(f, clamp(x * 1.4f, -0.9f, 0.9f), 0.2f, 0.6f);
  image = mix(image, hair * ((0.30f + 0.85f * facing) * shade), cover);
}

void draw_ears(const Frame& f, const Place& place, Color& image) {
  const Identity& identity = f.identity;
  for (int i = 0; i < 2; i++) {
    float side = i == 0 ? -1.f : 1.f;
    float ear[3] = {side * identity.head_width * 0.97f, -0.03f * identity.head_height, -0.05f};
    float ear_x = f.rotation[0][0] * ear[0] + f.rotation[0][1] * ear[1] + f.rotation[0][2] * ear[2];
    float ear_y = f.rotation[1][1] * ear[1] + f.rotation[1][2] * ear[2];
    float half_x = 0.064f * identity.ear_size * clamp(1 - side * 1.2f * f.motion.yaw, 0.3f, 1.5f);
    Float dx = (place.head_x - ear_x - side * 0.012f) / half_x,
          dy = (place.head_y - ear_y) / (0.122f * identity.ear_size);
    Float r = dx * dx + square(dy + 0.14f * side * dx);
    Float cover = smoothstep(1.08f, 0.90f, r);
    if (!any_above(cover, 0.f)) continue;
    Float facing = facing_light(f, dx * 0.5f, 0.2f, 0.7f);
    Float shade = 1.f - 0.45f * gaussian(r - 0.25f, 0.22f) - 0.2f * smoothstep(0.3f, -0.9f, dx * side);
    Color skin = texture(identity, Color(identity.skin), place.head_x * 3.f, place.head_y * 2.f, 0.f);
    image = mix(image, lit(f, skin * Color(1.f, 0.86f, 0.82f), facing, shade), cover);
    if (identity.earring == 0) continue;
    Float bead_x = (place.head_x - ear_x) / identity.earring,
          bead_y = (place.head_y - ear_y + 0.125f * identity.ear_size + identity.earring) / identity.earring;
    Float r2 = bead_x * bead_x + bead_y * bead_y;
    Color metal =
        Color(0.62f, 0.46f, 0.20f) * (0.35f + 0.7f * facing_light(f, bead_x, bead_y, sqrt(max(1.f - r2, 0.f))));
    image = mix(image, metal + 0.7f * gaussian(bead_x - 0.3f * f.light_side, bead_y - 0.35f, 0.3f, 0.3f),
                smoothstep(1.2f, 0.8f, r2));
  }
}

// ---------------------------------------------------------------- the face

// The light at a point of the face.
struct Light {
  Float x, y, z;        // normal
  Float facing, shade;  // see `lit`
  Float gloss;          // 16th power of the cosine to the half-way vector
};

// Lines of age: on the forehead, beside and below the eyes, between the brows, and below the corners of the mouth.
Float wrinkle_shade(const Frame& f, Float x, Float y) {
  const Identity& identity = f.identity;
  Float side = abs(x), bend = 0.012f * value_noise(x * 4.f, identity.phase[3]);
  Float forehead = smoothstep(0.55f, 1.f, sine((y + bend - 0.02f * square(x)) * 78.f)) * smoothstep(0.26f, 0.32f, y) *
                   smoothstep(0.60f, 0.50f, y) * smoothstep(0.55f, 0.25f, side);
  Float out = side - identity.eye_x - identity.eye_width, up = y - identity.eye_y;
  Float crow = smoothstep(0.3f, 1.f, sine(up / max(out + 0.10f, 0.03f) * 9.f)) * smoothstep(-0.01f, 0.03f, out) *
               smoothstep(0.14f, 0.05f, out) * smoothstep(0.11f, 0.06f, abs(up));
  Float bag = gaussian(side - identity.eye_x, y - identity.eye_y + 0.165f - 0.25f * square(side - identity.eye_x),
                       0.15f, 0.018f);
  Float marionette = gaussian(side - identity.mouth_width - 0.03f - 0.2f * (identity.mouth_y - y), 0.022f) *
                     smoothstep(0.f, -0.05f, y - identity.mouth_y) * smoothstep(-0.24f, -0.14f, y - identity.mouth_y);
  Float frown = gaussian(side - 0.055f, y - 0.20f, 0.014f, 0.07f);
  return 1.f - identity.wrinkles * clamp(0.28f * forehead * (1 + 0.5f * f.motion.brow) + 0.30f * crow + 0.28f * bag +
                                         0.30f * marionette + 0.20f * frown);
}

// Shade in the hollows of the face and towards its outline.
Float hollow_shade(const Frame& f, Float x, Float y, Float inside) {
  const Identity& identity = f.identity;
  Float side = abs(x);
  float bottom = identity.nose_bottom, mouth = identity.mouth_y;
  Float fold_x = side - (0.23f + 0.30f * (bottom - y));
  Float fold = gaussian(fold_x, 0.035f) * gaussian(y + 0.47f, 0.12f) * smoothstep(bottom + 0.05f, bottom - 0.06f, y);
  Float shade = 1.f - 0.28f * gaussian(side - 0.20f, y - identity.eye_y - 0.03f, 0.10f, 0.11f) -
                0.22f * gaussian(side - identity.eye_x, y - identity.eye_y - 0.11f, 0.19f, 0.055f) -
                0.28f * gaussian(x, y - bottom + 0.120f, 0.15f, 0.045f) -
                (0.18f + 0.22f * f.tuck) * gaussian(x, y - mouth + 0.165f - 0.035f * f.tuck, 0.17f, 0.045f) -
                0.10f * gaussian(side - f.mouth_half_width - 0.02f, y - mouth, 0.035f, 0.05f) -
                0.42f * f.motion.wide *
                    gaussian(side - f.mouth_half_width - 0.075f + 1.6f * square(y - mouth), y - mouth, 0.022f, 0.085f) -
                (0.08f + 0.12f * f.motion.smile + 0.26f * identity.wrinkles) * fold -
                0.08f * gaussian(side - identity.eye_x, y - identity.eye_y + 0.15f, 0.16f, 0.035f);
  return clamp(shade * (1.f - 0.42f * smoothstep(0.55f, 1.05f, 1.f - inside)), 0.2f);
}

// Skin with blush, spots, freckles and eye shadow.
Color skin_albedo(const Frame& f, Float x, Float y) {
  const Identity& identity = f.identity;
  const float* phase = identity.phase;
  Float side = abs(x);
  Float blush = 0.9f * gaussian(side - 0.50f, y + 0.28f, 0.20f, 0.16f) +
                0.5f * gaussian(x, y - identity.nose_bottom, 0.12f, 0.09f) + 0.35f * gaussian(x, y + 0.92f, 0.2f, 0.1f);
  Color albedo = Color(identity.skin) * (Color(0.f, -0.26f, -0.26f) * (blush * identity.blush) + 1.f);
  Float mottle =
      0.035f * value_noise(x * 9.f + phase[9], y * 9.f) + 0.02f * value_noise(x * 23.f, y * 23.f + phase[10]);
  albedo = albedo * (1.f + mottle * (1 + 1.5f * identity.wrinkles));
  if (identity.freckles > 0) {
    Float spots = max(value_noise(x * 38.f + 9.f, y * 38.f) - 0.35f, 0.f) * 1.3f *
                  gaussian(side - 0.28f, y + 0.18f, 0.38f, 0.17f);
    albedo = albedo * (1.f - spots * identity.freckles);
  }
  if (identity.makeup > 0) {
    Float shadow = gaussian(side - identity.eye_x, y - identity.eye_y - 0.085f, 0.19f, 0.045f) * identity.makeup;
    albedo = albedo * (1.f - 0.30f * shadow);
  }
  return texture(identity, albedo, x, y * 1.3f, 0.f);
}

// Share of the beard in a point of the skin.
Float beard_cover(const Frame& f, Float x, Float y) {
  const Identity& identity = f.identity;
  Float side = abs(x), below = y - identity.mouth_y;
  Float cheeks = smoothstep(0.10f, -0.10f, below - 0.16f - 0.42f * side * side + 0.03f * value_noise(x * 14.f, 3.f));
  cheeks = cheeks * smoothstep(identity.beard_width + 0.10f, identity.beard_width - 0.10f, side);
  Float under_nose = 1.f - 0.75f * gaussian(x, below - 0.15f, 0.05f, 0.05f);
  Float free = smoothstep(1.1f, 0.8f, gaussian(x, below - 0.02f, f.mouth_half_width * 1.06f, 0.085f) * 1.6f);
  Float hairs = 0.75f + 0.35f * value_noise(x * 46.f, y * 40.f);
  return clamp(cheeks * under_nose * free * hairs * identity.beard);
}

void draw_brow(const Frame& f, Float x, Float y, float side, const Light& light, Color& face) {
  const Identity& identity = f.identity;
  Float along = (x * side - identity.eye_x + 0.005f) / identity.brow_width;
  if (!any_above(1.2f - abs(along), 0.f)) return;
  Float middle = identity.eye_y + identity.brow_y + 0.02f + 0.055f * f.motion.brow +
                 identity.brow_arch * (1.f - square(along - 0.2f)) +
                 identity.brow_tilt * identity.brow_width * 0.6f * along;
  Float away = (y - middle) / (identity.brow_thickness * (1.f - 0.45f * smoothstep(0.1f, 1.1f, along)));
  if (!any_above(2.f - abs(away), 0.f)) return;
  Float hairs = 0.85f + 0.22f * value_noise(x * 40.f + side * y * 30.f, y * 20.f);
  Float cover = exp_minus(square(square(away))) * smoothstep(1.12f, 0.72f, abs(along)) * hairs;
  face = mix(face, lit(f, Color(identity.brow_color), light.facing, light.shade), clamp(cover * 0.88f));
}

void draw_eye(const Frame& f, Float x, Float y, float side, const Light& light, Color& face) {
  const Identity& identity = f.identity;
  Float across = x * side - identity.eye_x, up = y - identity.eye_y - identity.eye_tilt * across;
  Float along = across / identity.eye_width;
  if (!any_above(min(1.3f - abs(along), (0.3f - abs(up)) * 4.f), 0.f)) return;
  float height = identity.eye_height, edge = 1.8f * f.sample / identity.head_height;
  Float rest = max(1.f - along * along, 0.f), root = sqrt(rest);
  Float top = height * root * (1.f + 0.16f * along), bottom = -0.60f * height * rest * (1.f - 0.10f * along);
  top = top + (0.10f * height) * std::min(f.motion.gaze_y, 0.f) * root;
  bottom = bottom + 0.18f * height * f.motion.smile * rest;
  Float lid = top + (bottom + 0.006f - top) * f.motion.blink;
  Float open =
      smoothstep(-edge, edge, lid - up) * smoothstep(-edge, edge, up - bottom) * smoothstep(1.02f, 0.98f, abs(along));
  Color dark = lit(f, Color(identity.lash_color), light.facing, light.shade);
  if (any_above(open, 0.f)) {
    Float ball_x = (across - side * f.motion.gaze_x * 0.055f) * identity.head_width;
    Float ball_y = (up - f.motion.gaze_y * 0.030f - 0.008f) * identity.head_height;
    float radius = identity.iris_size;
    Float r = sqrt(square(ball_x) + square(ball_y) + 1e-8f) / radius;
    Float corner = along * along;
    Color eye = Color(identity.eye_white) * Color(1.f - 0.12f * corner, 1.f - 0.24f * corner, 1.f - 0.24f * corner);
    Float ring = 0.50f + 0.75f * smoothstep(0.35f, 0.78f, r) * smoothstep(1.02f, 0.80f, r) +
                 0.45f * smoothstep(0.4f, -0.8f, ball_y / radius) +
                 0.14f * value_noise(ball_x * (6 / radius), ball_y * (6 / radius));
    eye = mix(eye, Color(identity.iris) * ring, smoothstep(1.06f, 0.92f, r));
    eye = mix(eye, Color(0.006f, 0.006f, 0.006f), smoothstep(0.48f, 0.36f, r));
    eye = eye * ((0.38f + 0.72f * smoothstep(0.f, 1.1f, (lid - up) / height)) * (0.55f + 0.5f * identity.light_key));
    float spot_x = 0.018f * f.light_side;
    eye = eye + (1.0f * gaussian(ball_x - spot_x, ball_y - 0.019f, 0.0135f, 0.0135f) +
                 0.15f * gaussian(ball_x + spot_x, ball_y + 0.018f, 0.016f, 0.012f));
    eye = mix(eye, lit(f, Color(identity.skin) * Color(1.f, 0.62f, 0.58f), light.facing, light.shade),
              gaussian(along + 0.97f, 0.10f) * 0.8f);
    face = mix(face, eye, open);
  }
  Float near = smoothstep(1.10f, 0.98f, abs(along));
  Float thick = 0.015f + 0.009f * identity.makeup + 0.006f * clamp(along);
  face = mix(face, dark, gaussian(up - lid - 0.003f, thick) * near * (0.74f + 0.2f * identity.makeup));
  Float wing = smoothstep(0.72f, 1.f, along) * smoothstep(1.24f, 1.02f, along);
  face = mix(face, dark,
             gaussian(up - lid - 0.05f * max(along - 0.8f, 0.f), 0.016f) * wing * (0.25f + 0.5f * identity.makeup));
  Float crease = gaussian(up - top * (1.2f + 0.25f * (1.f - f.motion.blink)) - 0.040f, 0.016f) * near *
                 (1 - 0.5f * f.motion.blink);
  Float lower_lid = gaussian(up - bottom + 0.004f, 0.012f) * near;
  face = face * (1.f - 0.32f * crease) * (1.f - 0.24f * lower_lid);
}

// Teeth, tongue and the dark between them, between the inner contours of the lips.
Color mouth_interior(const Frame& f, const Mouth& m, Float x, Float y) {
  const Identity& identity = f.identity;
  const Motion& motion = f.motion;
  Float s2 = square(m.across), gap = max(m.upper_inner - m.lower_inner, 1e-4f), down = clamp((m.upper_inner - y) / gap);
  Color cavity = Color(0.10f, 0.020f, 0.018f) * (0.40f + 0.7f * down);
  float tooth_line = identity.mouth_y + 0.028f;
  float teeth_shown = square(1 - 0.95f * motion.round);
  Float upper_teeth = smoothstep(-f.blur, f.blur, y - (tooth_line - 0.058f * (1.f - 0.45f * s2))) *
                      smoothstep(0.97f, 0.78f, abs(m.across));
  Float lower_teeth = smoothstep(-f.blur, f.blur, m.lower_inner + 0.020f * (1.f - 0.3f * s2) - y) *
                      smoothstep(0.75f, 0.5f, abs(m.across)) * smoothstep(0.2f, 0.7f, f.opening);
  Float place = x * (1 / 0.062f), gap_line = abs(abs(place - floor(place) - 0.5f) - 0.5f);
  Color tooth = Color(0.86f, 0.82f, 0.75f) * (1.f - 0.30f * s2 - 0.08f * smoothstep(0.07f, 0.03f, gap_line) -
                                              0.20f * smoothstep(0.35f, 0.f, (m.upper_inner - y) * 20.f));
  float lift = f.tongue_lift;
  Float tongue_top = m.lower_inner + 0.028f + 0.014f * f.opening + 0.082f * lift - s2 * (0.05f + 0.05f * lift);
  Float tongue = smoothstep(-0.014f, 0.014f, tongue_top - y) * smoothstep(0.85f, 0.55f, abs(m.across)) *
                 smoothstep(0.08f, 0.45f, f.opening + 0.6f * lift);
  Color flesh = Color(0.52f + 0.16f * lift, 0.16f + 0.07f * lift, 0.15f + 0.08f * lift) *
                ((0.55f + 0.55f * smoothstep(0.f, 1.f, (y - m.lower_inner) / max(tongue_top - m.lower_inner, 1e-3f))) *
                 (1.f - 0.2f * gaussian(m.across, 0.08f)));
  Float tongue_before = tongue * lift;  // a lifted tip lies before the upper teeth's edge
  cavity = mix(cavity, flesh, tongue * 0.92f);
  cavity = mix(cavity, tooth * 0.6f, lower_teeth * 0.6f * (1.f - 0.8f * lift));
  cavity = mix(cavity, tooth, upper_teeth * teeth_shown * (1.f - 0.92f * tongue_before));
  return cavity * ((0.50f + 0.50f * smoothstep(0.f, 0.30f, down)) * (0.55f + 0.5f * identity.light_key));
}

void draw_mouth(const Frame& f, Float x, Float y, const Light& light, Color& face) {
  const Identity& identity = f.identity;
  if (!any_above(min(0.75f - abs(x), 0.28f + identity.mouth_y - y), 0.f)) return;
  Mouth m = mouth_at(f, x, y);
  float close = f.motion.close, strength = 0.84f + 0.14f * identity.makeup;
  Float upper = (y - m.upper_inner) / max(m.upper_outer - m.upper_inner, 0.004f);
  Float lower = (m.lower_inner - y) / max(m.lower_inner - m.lower_outer, 0.004f);
  Float to_rim = clamp(max(upper, lower));  // 0 at the inner contour, 1 at the outer one
  Color color = mix(Color(identity.lip_inner), Color(identity.lip_rim), smoothstep(0.15f, 0.95f, to_rim));
  color = color * ((1.f - 0.24f * m.is_upper) * (1.f + 0.05f * sine(m.across * 26.f)));
  Float lower_middle = (m.lower_inner + m.lower_outer) * 0.5f;
  Float shine = gaussian(m.across + 0.12f * identity.light_x, 0.42f) * gaussian(y - lower_middle - 0.008f, 0.016f) *
                (1.f - m.is_upper);
  Color lips = lit(f, color, light.facing, max(light.shade, 0.75f)) +
               f.light_color *
                   ((0.11f * (1 + 0.5f * f.motion.round) * (1 - 0.7f * close) * shine + 0.05f * square(light.gloss)) *
                    (0.6f + 0.6f * identity.makeup));
  face = mix(face, lips, m.lips * strength);
  Float gap = m.upper_inner - m.lower_inner, reach = abs(m.across);
  Float line = gaussian(y - (m.upper_inner + m.lower_inner) * 0.5f, 0.011f + 0.3f * gap) *
               smoothstep(1.05f + 0.1f * close, 0.92f, reach) * smoothstep(0.03f, 0.f, gap);
  face = face * (1.f - (0.60f + 0.22f * close) * line);
  face = face * (1.f - (0.36f + 0.2f * close) * gaussian(abs(x) - f.mouth_half_width, y - m.resting, 0.035f, 0.024f));
  if (any_above(m.inside, 0.f)) face = mix(face, mouth_interior(f, m, x, y), m.inside);
}

// A block of the head without hair; `light` holds its normals.
void draw_face(const Frame& f, const Surface& s, Light light, Color& image) {
  const Identity& identity = f.identity;
  float blur = 2.4f * f.sample / (identity.scale * identity.head_width);
  Float cover = smoothstep(-blur, 2.f * blur, s.inside);
  if (!any_above(cover, 0.f)) return;
  Float x = s.x, y = s.y;
  light.shade = hollow_shade(f, x, y, s.inside);
  if (identity.wrinkles > 0) light.shade = light.shade * wrinkle_shade(f, x, y);
  Color albedo = skin_albedo(f, x, y);
  Float beard = 0.f;
  if (identity.beard > 0) {
    beard = beard_cover(f, x, y);
    albedo = mix(albedo, Color(identity.beard_color), beard);
  }
  Float gloss48 = light.gloss * light.gloss * light.gloss;
  Color face = lit(f, albedo, light.facing, light.shade) +
               f.light_color * ((0.080f * light.gloss + 0.05f * gloss48) * identity.light_key * (1.f - 0.7f * beard));
  Float wing = gaussian(abs(x) - 0.175f * identity.nose_width + 0.25f * (y - identity.nose_bottom + 0.04f),
                        y - identity.nose_bottom + 0.035f, 0.020f, 0.050f);
  face = face * (1.f - 0.20f * wing);
  Float nostril = gaussian(abs(x) - 0.078f * identity.nose_width, y - identity.nose_bottom + 0.082f, 0.040f, 0.022f);
  face = face * (1.f - 0.70f * nostril);
  for (int i = 0; i < 2; i++) {
    draw_brow(f, x, y, i ? 1.f : -1.f, light, face);
    draw_eye(f, x, y, i ? 1.f : -1.f, light, face);
  }
  draw_mouth(f, x, y, light, face);
  Float grazing = 1.f - light.z;
  face = face + f.light_color *
                    (grazing * grazing * grazing * (identity.rim * 0.55f) * max(-light.x * f.light_side + 0.2f, 0.f));
  image = mix(image, face, cover);
}

// ---------------------------------------------------------------- before the face

// The shell of the hair that lies on the head.
Hit hair_shell(const Frame& f, const Place& place) {
  const Identity& identity = f.identity;
  const float* phase = identity.phase;
  float side = identity.hair_side, top = identity.hair_top;
  Float turn = quarter_turns(-(place.head_y - 0.05f), place.head_x);
  Float rough = 0.018f * value_noise(turn * 5.f + phase[0], 1.f) + 0.012f * value_noise(turn * 16.f + phase[1], 2.f);
  Float curl = 0.030f * value_noise(turn * 10.f + phase[1], 5.f) + 0.015f * value_noise(turn * 23.f + phase[2], 7.f);
  Float ripple = identity.hair_rough * rough + identity.hair_curl * std::min(top * 7.f, 1.2f) * curl;
  Float width = outline(identity, place.head_y * (0.9f / identity.head_height)) +
                identity.hair_square * smoothstep(0.f, 0.65f, place.head_y);
  return hit_ellipsoid(
      f, place.head_x / width, place.head_y - 0.03f,
      identity.head_width + 0.012f + side * (1.f - 0.3f * smoothstep(0.f, 0.6f, place.head_y)) + ripple,
      identity.head_height + top + ripple, identity.head_depth + 0.5f * (side + top));
}

// Where the hair begins: below 1 in the opening for the face, a rounded rectangle under the hairline, above 1 outside.
Float hair_border(const Identity& identity, Float x, Float y) {
  const float* phase = identity.phase;
  float part = identity.parting, toward = part > 0 ? 1.f : -1.f;
  Float line = identity.hairline + identity.recession * (0.14f + 0.14f * smoothstep(0.10f, 0.45f, abs(x)));
  line =
      line + identity.sweep * (0.12f * gaussian(x - part, 0.20f) - 0.17f * smoothstep(0.f, 0.9f, (part - x) * toward));
  Float tip = value_noise(x * 9.f + phase[4] + 2.f * identity.sweep * y, 3.f);
  Float fine_tip = value_noise(x * 24.f + phase[5] + y * 3.f, 8.f);
  line = line - identity.fringe * (0.22f + 0.07f * tip + 0.05f * fine_tip);
  line = line + identity.hair_rough * (0.020f * tip + 0.014f * fine_tip);
  Float over = max(y + 0.25f, 0.f) / (line + 0.25f), out = abs(x) / identity.temple;
  return out * out * sqrt(out) + over * over * sqrt(over);
}

// Light on the hair of the shell at a hit.
Color hair_color(const Frame& f, const Hit& hit, Float x, Float y, Float border) {
  const Identity& identity = f.identity;
  const float* phase = identity.phase;
  // The strands flow from a point at the crown, or from behind it where the hair is combed back.
  Float from_x = x - identity.parting * 0.45f, from_y = y - 0.98f - 0.35f * identity.swept_back;
  Float flow = quarter_turns(-from_y, from_x), away = sqrt(from_x * from_x + from_y * from_y);
  Float across = flow * identity.lock_count + 0.6f * identity.hair_wave * sine(away * 12.f + phase[7]);
  Float shade = strands(across, away * 2.2f + phase[8], phase[9], identity.hair_layers);
  shade = curled(identity, shade, x, y);

  Float normal[3] = {hit.x / square(identity.head_width), hit.y / square(identity.head_height),
                     hit.z / square(identity.head_depth)};
  Float length = sqrt(square(normal[0]) + square(normal[1]) + square(normal[2]) + 1e-6f);
  Float view[3];
  for (int i = 0; i < 3; i++)
    view[i] = (f.rotation[i][0] * normal[0] + f.rotation[i][1] * normal[1] + f.rotation[i][2] * normal[2]) / length;
  Float facing = clamp((view[0] * f.light[0] + view[1] * f.light[1] + view[2] * f.light[2] + 0.3f) / 1.3f);
  Float band = gaussian(view[1] - 0.60f - 0.16f * (shade - 0.7f), 0.15f) * (view[2] * 0.5f + 0.5f) *
               (0.6f + 0.4f * clamp(view[0] * (2 * f.light[0]) + 0.5f));
  Color hair = texture(identity, Color(identity.hair), x, y, 1.f);
  Color color =
      hair * ((0.24f + 0.95f * facing) * shade) +
      (hair * 0.9f + 0.045f) * f.light_color * (band * shade * (0.55f * identity.light_key * identity.hair_shine));
  return color * (0.62f + 0.38f * smoothstep(0.97f, 1.35f, border));  // roots at the hairline are darker
}

// The hair that lies on the head, with its shadow on the forehead.
void draw_hair(const Frame& f, const Place& place, const Surface& s, Color& image) {
  const Identity& identity = f.identity;
  if (identity.hair_cover == 0) return;
  Hit hit = hair_shell(f, place);
  if (!any_above(hit.inside, -0.04f)) return;
  Float x = hit.x / identity.head_width, y = (hit.y + 0.03f) / identity.head_height;
  Float border = hair_border(identity, x, y);
  float soft = 0.05f + 0.06f * (1 - std::min(identity.fringe, 1.f)), edge = 2.4f * f.sample / identity.head_width;
  Float hairs = 0.055f * std::min(identity.hair_rough, 1.f) * value_noise(x * 26.f, y * 5.f + identity.phase[6]);
  Float covered = smoothstep(1.f - soft, 1.f + 1.3f * soft, border + hairs);
  Float bottom = -identity.sideburn + 0.04f * value_noise(x * 9.f, 4.f);
  Float sides = smoothstep(bottom - 0.05f, bottom + 0.07f, y);
  Float behind = max(smoothstep(0.05f, -0.05f, hit.z), smoothstep(0.f, -0.06f, s.inside));
  Float bald = clamp(identity.recession - 1) * smoothstep(0.18f, 0.50f, y);
  Float cover = smoothstep(-0.5f * edge, 1.5f * edge, hit.inside) * max(covered, behind) * sides * identity.hair_cover *
                (1.f - bald);
  if (identity.hair_cover < 1) cover = cover * smoothstep(-0.05f, 0.f, s.inside);  // a few millimetres show skin only
  Float shadow = smoothstep(0.66f, 1.f, border) * (1.f - covered) * smoothstep(0.f, 0.1f, s.inside) *
                 smoothstep(0.f, 0.3f, hit.z) * sides;
  image = image * (1.f - 0.34f * identity.hair_cover * shadow);
  if (any_above(cover, 0.f)) image = mix(image, hair_color(f, hit, x, y, border), cover);
}

void draw_glasses(const Frame& f, const Surface& s, Color& image) {
  const Identity& identity = f.identity;
  if (identity.glasses == 0) return;
  Float x = (abs(s.x) - identity.eye_x) / 0.285f, y = (s.y - identity.eye_y + 0.02f) / identity.glasses_height;
  if (!any_above(1.6f - max(abs(x) * 0.7f, abs(y)), 0.f)) return;
  Float fourth = square(square(x)) + square(square(y)), round = sqrt(sqrt(fourth + 1e-6f));
  Float temple_piece = gaussian(y - 0.35f, 0.10f) * smoothstep(1.0f, 1.1f, x) * smoothstep(0.5f, 0.2f, s.front);
  Float bridge = gaussian(y - 0.35f, 0.14f) * smoothstep(-0.95f, -1.05f, x);
  Float frame =
      max(max(smoothstep(identity.glasses_thickness, 0.5f * identity.glasses_thickness, abs(round - 1.f)), bridge) *
              smoothstep(0.05f, 0.25f, s.front),
          temple_piece);
  frame = frame * smoothstep(-0.02f, 0.02f, s.inside);
  image = mix(image, Color(identity.glasses_color), frame * 0.92f);
  Float lens = smoothstep(1.f, 0.9f, round) * smoothstep(0.05f, 0.25f, s.front) * smoothstep(-0.02f, 0.02f, s.inside);
  image = image + 0.028f * lens * smoothstep(0.1f, 0.3f, x + y);
}

// ---------------------------------------------------------------- the picture

constexpr int MARGIN = LANES;  // samples of the surface around the window, for the normals

// Depth and face coordinates of all samples of a window and its margin, row by row.
struct Surfaces {
  int left, top, width, height;
  std::vector<float> inside, depth, x, y, front;
  Surfaces(int left, int top, int width, int height) : left(left), top(top), width(width), height(height) {
    for (auto* plane : {&inside, &depth, &x, &y, &front}) plane->resize(width * height);
  }
};

inline Float load(const float* from) {
  FloatLanes lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
inline void store(Float a, float* to) { __builtin_memcpy(to, &a.lanes, sizeof a.lanes); }

inline Float sample_x(int column, float sample) {
  Float x;
  for (int i = 0; i < LANES; i++) x.lanes[i] = (column + i + 0.5f) * sample - 1;
  return x;
}
inline float sample_y(int row, float sample) { return 1 - (row + 0.5f) * sample; }

void find_surfaces(const Frame& f, Surfaces& all) {
  for (int row = 0; row < all.height; row++)
    for (int column = 0; column < all.width; column += LANES) {
      Place place = place_of(f, sample_x(all.left + column, f.sample), sample_y(all.top + row, f.sample));
      Surface s = surface_at(f, place);
      int at = row * all.width + column;
      store(s.inside, &all.inside[at]);
      store(where_less(s.inside, -0.2f, -9.f, s.depth), &all.depth[at]);
      store(s.x, &all.x[at]);
      store(s.y, &all.y[at]);
      store(s.front, &all.front[at]);
    }
}

// Slope of the depth from the two neighbours; one that is not on the head counts as the point itself.
Float slope(Float before, Float here, Float after, float distance) {
  before = where_less(before, -8.f, here, before);
  after = where_less(after, -8.f, here, after);
  return clamp((after - before) / distance, -3.f, 3.f);
}

Light light_at(const Frame& f, const Surfaces& all, int at) {
  float distance = 2 * f.sample / f.identity.scale;
  const float* depth = all.depth.data() + at;
  Float here = load(depth);
  Float slope_x = slope(load(depth - 1), here, load(depth + 1), distance);
  Float slope_y = slope(load(depth + all.width), here, load(depth - all.width), distance);
  Light light;
  light.z = 1.f / sqrt(1.f + slope_x * slope_x + slope_y * slope_y);
  light.x = -slope_x * light.z;
  light.y = -slope_y * light.z;
  light.facing = facing_light(f, light.x, light.y, light.z);
  light.shade = 1.f;
  Float mirror = max(light.x * f.half_way[0] + light.y * f.half_way[1] + light.z * f.half_way[2], 0.f);
  light.gloss = square(square(square(square(mirror))));
  return light;
}

// Samples of one block from back to front.
Color draw_block(const Frame& f, const Place& place, const Surfaces& all, int at, Color image) {
  draw_back_hair(f, place, image);
  draw_bun(f, place, image);
  draw_neck(f, place, image);
  draw_body(f, place, image);
  Surface s = {load(&all.inside[at]), load(&all.depth[at]), load(&all.x[at]), load(&all.y[at]), load(&all.front[at])};
  if (any_above(1.6f - abs(place.head_x) - 0.2f * abs(place.head_y), 0.f)) {
    draw_ears(f, place, image);
    draw_front_locks(f, place, image);
    if (any_above(s.inside, -0.1f)) draw_face(f, s, light_at(f, all, at), image);
    if (any_above(s.inside, -0.1f)) draw_glasses(f, s, image);
    draw_hair(f, place, s, image);
  }
  return image;
}

// From linear light 0 .. to bytes: a soft shoulder, then about the sRGB curve.
uint8_t to_byte(float light) {
  light = std::max(light, 0.f);
  light = std::min(light * 1.06f / (1 + 0.16f * light), 1.f);
  float root = std::sqrt(light), root4 = std::sqrt(root), root8 = std::sqrt(root4);
  float srgb = 0.585122381f * root + 0.783140355f * root4 - 0.368262736f * root8;
  return (uint8_t)(clamp(srgb) * 255 + 0.5f);
}

}  // namespace

// Frames of one identity: bytes RGB [frames][width][width][3] of the window whose upper left pixel is (left, top) in
// the picture of size x size pixels. `motions` holds the members of Motion of one frame after the other.
extern "C" void render_frames(const float* identity_values, const float* motions, int frames, int size, int left,
                              int top, int width, uint8_t* bytes) {
  const Identity& identity = *reinterpret_cast<const Identity*>(identity_values);
  constexpr int pixels = LANES / 2;
  int first = left / pixels * pixels, blocks = (left + width - first + pixels - 1) / pixels;
  float sample = 1.f / size;
  std::vector<Color> background(2 * width * blocks);  // the same in all frames
  for (int row = 0; row < 2 * width; row++)
    for (int block = 0; block < blocks; block++)
      background[row * blocks + block] =
          draw_background(identity, sample_x(2 * first + block * LANES, sample), sample_y(2 * top + row, sample));

  Surfaces all(2 * first - MARGIN, 2 * top - 1, blocks * LANES + 2 * MARGIN, 2 * width + 2);
  for (int frame = 0; frame < frames; frame++) {
    const Motion& motion = reinterpret_cast<const Motion*>(motions)[frame];
    Frame f = make_frame(identity, motion, size);
    find_surfaces(f, all);
    for (int row = 0; row < width; row++)
      for (int block = 0; block < blocks; block++) {
        Color sum = {0.f, 0.f, 0.f};
        for (int half = 0; half < 2; half++) {
          int sample_row = 2 * row + half;
          Place place =
              place_of(f, sample_x(2 * first + block * LANES, sample), sample_y(2 * top + sample_row, sample));
          int at = (sample_row + 1) * all.width + MARGIN + block * LANES;
          sum = sum + draw_block(f, place, all, at, background[sample_row * blocks + block]);
        }
        for (int i = 0; i < pixels; i++) {
          int column = first + block * pixels + i - left;
          if (column < 0 || column >= width) continue;
          uint8_t* pixel = bytes + ((int64_t)(frame * width + row) * width + column) * 3;
          pixel[0] = to_byte((sum.red.lanes[2 * i] + sum.red.lanes[2 * i + 1]) * 0.25f);
          pixel[1] = to_byte((sum.green.lanes[2 * i] + sum.green.lanes[2 * i + 1]) * 0.25f);
          pixel[2] = to_byte((sum.blue.lanes[2 * i] + sum.blue.lanes[2 * i + 1]) * 0.25f);
        }
      }
  }
}
