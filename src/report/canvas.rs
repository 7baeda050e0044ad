//! A picture in memory that plotters draws on.
//!
//! plotters' own bitmap backend brings an image library along, and its text stands a fifth of its
//! height too high and without the letters' side bearings. Here the letters are set by their
//! font's own measures, and all is drawn at [`SCALE`] times the size and averaged down, which
//! smooths the edges that plotters' rasteriser leaves rough.

use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters_backend::{BackendColor, BackendCoord, BackendTextStyle, DrawingErrorKind, FontTransform};

/// DejaVu Sans: it has more of the world's letters than other fonts of its size and licence.
const FONT: &[u8] = include_bytes!("../../assets/DejaVuSans.ttf");
/// How much larger the picture is drawn than it is written, in each direction.
pub const SCALE: u32 = 2;
/// A capital letter's height by the em: a text is as high as that, whatever hangs under its line.
const CAPITAL: f32 = 0.73;

/// Of titles and labels.
pub const INK: RGBColor = RGBColor(38, 38, 38);
/// Of axes and of what is said beside.
pub const GREY: RGBColor = RGBColor(110, 110, 110);

/// Of lines behind what is drawn.
pub const LIGHT: RGBColor = RGBColor(228, 228, 228);
/// Okabe and Ito's palette: told apart with any kind of colour blindness.
pub const BLUE: RGBColor = RGBColor(0, 114, 178);
/// The same.
pub const ORANGE: RGBColor = RGBColor(213, 94, 0);
/// The same.
pub const GREEN: RGBColor = RGBColor(0, 158, 115);

/// Pixels of the PNG in a canvas's coordinates.
pub fn px(n: i32) -> i32 {
    n * SCALE as i32
}

/// A text's style: `size` pixels of the PNG to the em; its middle stands where it is drawn.
pub fn text(size: f64, color: RGBColor, h_pos: HPos) -> TextStyle<'static> {
    TextStyle {
        color: color.to_backend_color(),
        pos: Pos::new(h_pos, VPos::Center),
        ..("sans-serif", size * f64::from(SCALE)).into()
    }
}

/// What plotters draws a [`Canvas`] through.
pub type Area<'a> = DrawingArea<Backend<'a>, Shift>;

/// A picture, white at first. Coordinates count [`SCALE`] to a pixel of the PNG.
pub struct Canvas {
    width: u32,
    height: u32,
    pixels: Vec<[u8; 3]>, // [height × width]
    font: FontRef<'static>,
}

impl Canvas {
    /// A canvas for a PNG of `width` × `height` pixels.
    pub fn new(width: u32, height: u32) -> Result<Self> {
        let (width, height) = (width * SCALE, height * SCALE);
        Ok(Self {
            width,
            height,
            pixels: vec![[255; 3]; width as usize * height as usize],
            font: FontRef::try_from_slice(FONT).context("the embedded font is broken")?,
        })
    }

    /// What to draw on it with.
    pub fn area(&mut self) -> Area<'_> {
        Backend(self).into_drawing_area()
    }

    /// The picture as a PNG file's bytes.
    pub fn png(&self) -> Result<Vec<u8>> {
        let (width, height) = (self.width / SCALE, self.height / SCALE);
        let mut data = Vec::with_capacity(width as usize * height as usize * 3);
        for y in 0..height {
            for x in 0..width {
                let mut sums = [0; 3];
                for dy in 0..SCALE {
                    let row = (y * SCALE + dy) as usize * self.width as usize;
                    for pixel in &self.pixels[row + (x * SCALE) as usize..][..SCALE as usize] {
                        for (sum, &value) in sums.iter_mut().zip(pixel) {
                            *sum += u32::from(value);
                        }
                    }
                }
                data.extend(sums.map(|sum| (sum / (SCALE * SCALE)) as u8));
            }
        }
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&data)?;
        writer.finish()?;
        Ok(file)
    }

    /// The width of a text with `size` pixels to the em.
    fn text_width(&self, text: &str, size: f32) -> f32 {
        self.letters(text, size).1
    }

    /// A text's glyphs with the place of each on the base line, and the text's width.
    fn letters(&self, text: &str, size: f32) -> (Vec<ab_glyph::Glyph>, f32) {
        // ab_glyph scales a font by the height of its lines, everybody else by its em.
        let em = self.font.units_per_em().unwrap_or(2048.0);
        let scale = PxScale::from(size * self.font.height_unscaled() / em);
        let font = self.font.as_scaled(scale);
        let mut x = 0.0;
        let mut last = None;
        let mut glyphs = Vec::new();
        for c in text.chars() {
            let id = font.glyph_id(c);
            if let Some(last) = last.replace(id) {
                x += font.kern(last, id);
            }
            glyphs.push(id.with_scale_and_position(scale, point(x, 0.0)));
            x += font.h_advance(id);
        }
        (glyphs, x)
    }

    fn blend(&mut self, (x, y): BackendCoord, color: BackendColor) {
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else {
            return;
        };
        if x < self.width && y < self.height {
            let pixel = &mut self.pixels[y as usize * self.width as usize + x as usize];
            let (r, g, b) = color.rgb;
            for (old, new) in pixel.iter_mut().zip([r, g, b]) {
                let mixed = f64::from(*old) * (1.0 - color.alpha) + f64::from(new) * color.alpha;
                *old = mixed.round() as u8;
            }
        }
    }
}

/// A [`Canvas`] as plotters' drawing backend.
pub struct Backend<'a>(&'a mut Canvas);

impl DrawingBackend for Backend<'_> {
    type ErrorType = std::convert::Infallible;

    fn get_size(&self) -> (u32, u32) {
        (self.0.width, self.0.height)
    }

    fn ensure_prepared(&mut self) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        Ok(())
    }

    fn present(&mut self) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        Ok(())
    }

    fn draw_pixel(
        &mut self,
        point: BackendCoord,
        color: BackendColor,
    ) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        self.0.blend(point, color);
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(
        &self,
        text: &str,
        style: &S,
    ) -> Result<(u32, u32), DrawingErrorKind<Self::ErrorType>> {
        let size = style.size() as f32;
        let width = self.0.text_width(text, size);
        Ok((width.ceil() as u32, (CAPITAL * size).ceil() as u32))
    }

    fn draw_text<S: BackendTextStyle>(
        &mut self,
        text: &str,
        style: &S,
        (left, top): BackendCoord,
    ) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        let size = style.size() as f32;
        let (glyphs, width) = self.0.letters(text, size);
        let dx = match style.anchor().h_pos {
            HPos::Left => 0.0,
            HPos::Center => -width / 2.0,
            HPos::Right => -width,
        };
        let base = match style.anchor().v_pos {
            VPos::Top => CAPITAL * size,
            VPos::Center => CAPITAL * size / 2.0,
            VPos::Bottom => 0.0,
        };
        let transform: FontTransform = style.transform();
        for mut glyph in glyphs {
            glyph.position.x += dx.round();
            glyph.position.y += base.round();
            let Some(outline) = self.0.font.outline_glyph(glyph) else {
                continue; // a space
            };
            let bounds = outline.px_bounds();
            outline.draw(|x, y, coverage| {
                let x = bounds.min.x as i32 + x as i32;
                let y = bounds.min.y as i32 + y as i32;
                let (x, y) = transform.transform(x, y);
                let mut color = style.color();
                color.alpha *= f64::from(coverage.min(1.0));
                self.0.blend((left + x, top + y), color);
            });
        }
        Ok(())
    }
}
