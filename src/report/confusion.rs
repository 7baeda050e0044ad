use std::path::Path;

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::canvas::{Area, Canvas, GREY, INK, SCALE, px, text};
use super::shorten;
use crate::metrics::Confusion;
use crate::store;

/// More classes than this have no room; the ones with the most mistakes are drawn then.
const MOST_CLASSES: usize = 64;
const LABEL_COLUMNS: usize = 24;
/// From white to dark blue, as even to the eye as it is in shares: lightness alone tells them
/// apart, so colour blindness and grey printing do not matter.
const SHADES: [[f64; 3]; 5] =
    [[255.0, 255.0, 255.0], [198.0, 219.0, 239.0], [107.0, 174.0, 214.0], [33.0, 113.0, 181.0], [8.0, 48.0, 107.0]];

/// Draws what each label was taken for, as a PNG: a row for each label, its counts shaded by their
/// share of the row.
///
/// `labels` are the classes' names in id order. Of more than 64 classes it shows the 64 with the
/// most mistakes and says so.
///
/// # Errors
/// Where there is not one name for each class, no class at all, or the picture cannot be written.
pub fn confusion(confusion: &Confusion, labels: &[String], png: &Path) -> Result<()> {
    ensure!(
        labels.len() == confusion.classes() && !labels.is_empty(),
        "a confusion matrix of {} classes needs as many labels, at least 1; got {}",
        confusion.classes(),
        labels.len()
    );
    let picture = Picture::new(confusion, labels);
    let (width, height) = picture.size()?;
    let mut canvas = Canvas::new(width, height)?;
    picture.draw(&canvas.area()).with_context(|| format!("cannot draw {}", png.display()))?;
    let bytes = canvas.png()?;
    store::write_bytes(png, &bytes)
}

/// The classes that there is room for: all, or the 64 with the most mistakes.
pub(super) fn shown_classes(confusion: &Confusion) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..confusion.classes()).collect();
    if shown.len() > MOST_CLASSES {
        let mistakes = |&id: &usize| {
            let row: u64 = confusion.row(id).iter().sum();
            row - confusion.get(id, id)
        };
        shown.sort_by_key(|id| std::cmp::Reverse(mistakes(id)));
        shown.truncate(MOST_CLASSES);
        shown.sort_unstable();
    }
    shown
}

struct Picture<'a> {
    confusion: &'a Confusion,
    labels: Vec<String>, // [shown]
    shown: Vec<usize>,   // ids
    cell: i32,           // pixels
    label_size: f64,     // pixels to the em
}

/// The room around the matrix that does not depend on the labels, in pixels.
const TOP: i32 = 66;
const RIGHT: i32 = 96;
const LEFT: i32 = 44;
const BOTTOM: i32 = 44;

impl<'a> Picture<'a> {
    fn new(confusion: &'a Confusion, labels: &[String]) -> Self {
        let shown = shown_classes(confusion);
        let n = shown.len() as i32;
        let cell = (1350 / n).clamp(20, (300 / n).max(92));
        Self {
            confusion,
            labels: shown.iter().map(|&id| shorten(&labels[id], LABEL_COLUMNS)).collect(),
            shown,
            cell,
            label_size: f64::from(cell / 2).clamp(11.0, 15.0),
        }
    }

    /// The longest label's length, in pixels.
    fn label_length(&self) -> Result<i32> {
        let mut scratch = Canvas::new(1, 1)?;
        let area = scratch.area();
        let style = text(self.label_size, INK, HPos::Left);
        let mut longest = 0;
        for label in &self.labels {
            longest = longest.max(area.estimate_text_size(label, &style)?.0);
        }
        Ok(longest.div_ceil(SCALE) as i32)
    }

    /// The upper left corner of the matrix, in pixels.
    fn corner(&self) -> Result<(i32, i32)> {
        Ok((LEFT + self.label_length()?, TOP))
    }

    fn side(&self) -> i32 {
        self.cell * self.shown.len() as i32
    }

    fn size(&self) -> Result<(u32, u32)> {
        let (left, top) = self.corner()?;
        let height = top + self.side() + self.label_length()? + BOTTOM;
        // The title needs its room where labels are few and short.
        let width = (left + self.side() + RIGHT).max(440);
        Ok((width as u32, height as u32))
    }

    fn draw(&self, area: &Area) -> Result<()> {
        let (left, top) = self.corner()?;
        let side = self.side();
        self.title(area)?;

        for (row, &truth) in self.shown.iter().enumerate() {
            let total: u64 = self.confusion.row(truth).iter().sum();
            for (column, &predicted) in self.shown.iter().enumerate() {
                let count = self.confusion.get(truth, predicted);
                let x = left + column as i32 * self.cell;
                let y = top + row as i32 * self.cell;
                self.cell(area, (x, y), count, total)?;
            }
        }

        let frame = [(left, top), (left + side, top + side)].map(|(x, y)| (px(x), px(y)));
        area.draw(&Rectangle::new(frame, GREY.stroke_width(SCALE)))?;

        let label = text(self.label_size, INK, HPos::Right);
        for (i, name) in self.labels.iter().enumerate() {
            let middle = i as i32 * self.cell + self.cell / 2;
            area.draw_text(name, &label, (px(left - 8), px(top + middle)))?;
            let upright = label.transform(FontTransform::Rotate270);
            area.draw_text(name, &upright, (px(left + middle), px(top + side + 8)))?;
        }
        let axis = text(14.0, GREY, HPos::Center);
        let under = top + side + self.label_length()? + 28;
        area.draw_text("predicted label", &axis, (px(left + side / 2), px(under)))?;
        let upright = axis.transform(FontTransform::Rotate270);
        area.draw_text("true label", &upright, (px(18), px(top + side / 2)))?;
        self.scale(area, (left + side + 24, top))
    }

    fn title(&self, area: &Area) -> Result<()> {
        let classes = self.confusion.classes();
        let all = (0..classes).flat_map(|id| self.confusion.row(id)).sum::<u64>();
        let right: u64 = (0..classes).map(|id| self.confusion.get(id, id)).sum();
        let said = if self.shown.len() < classes {
            format!("the {} labels of {classes} with the most mistakes", self.shown.len())
        } else {
            format!("{right} of {all} right")
        };
        let title = text(18.0, INK, HPos::Left);
        area.draw_text("Confusion", &title, (px(20), px(32)))?;
        let (width, _) = area.estimate_text_size("Confusion", &title)?;
        area.draw_text(&said, &text(14.0, GREY, HPos::Left), (px(20 + 16) + width as i32, px(33)))?;
        Ok(())
    }

    fn cell(&self, area: &Area, (x, y): (i32, i32), count: u64, total: u64) -> Result<()> {
        let share = if total == 0 { 0.0 } else { count as f64 / total as f64 };
        // A hair of white is left between the cells. One mistake of many rows has some colour too.
        let corners = [(px(x) + 1, px(y) + 1), (px(x + self.cell) - 2, px(y + self.cell) - 2)];
        let color = if count == 0 { RGBColor(250, 250, 250) } else { shade(0.05 + 0.95 * share) };
        area.draw(&Rectangle::new(corners, color.filled()))?;
        if count == 0 {
            return Ok(());
        }
        let ink = if share > 0.5 { WHITE } else { INK };
        let middle = (px(x) + px(self.cell) / 2, px(y) + px(self.cell) / 2);
        let number = count.to_string();
        // As large as the cell has room for.
        let room = (self.cell - 4) as f64 / (0.64 * number.len() as f64);
        let size = room.min(f64::from(self.cell) * 0.42).min(16.0);
        let style = text(size, ink, HPos::Center);
        if self.cell >= 60 {
            let (x, y) = middle;
            area.draw_text(&number, &style, (x, y - px(8)))?;
            let percent = text(11.0, if share > 0.5 { WHITE } else { GREY }, HPos::Center);
            area.draw_text(&format!("{:.1}%", share * 100.0), &percent, (x, y + px(12)))?;
        } else if size >= 5.5 {
            area.draw_text(&number, &style, middle)?;
        }
        Ok(())
    }

    /// What the shades mean.
    fn scale(&self, area: &Area, (x, y): (i32, i32)) -> Result<()> {
        let height = self.side().min(260);
        for line in 0..px(height) {
            let share = 1.0 - f64::from(line) / f64::from(px(height));
            let ends = vec![(px(x), px(y) + line), (px(x + 14), px(y) + line)];
            area.draw(&PathElement::new(ends, shade(share)))?;
        }
        let frame = [(px(x), px(y)), (px(x + 14), px(y + height))];
        area.draw(&Rectangle::new(frame, GREY.stroke_width(1)))?;
        for (share, said) in [(1.0, "100%"), (0.5, "50%"), (0.0, "0%")] {
            let at = y + (f64::from(height) * (1.0 - share)) as i32;
            area.draw_text(said, &text(12.0, GREY, HPos::Left), (px(x + 20), px(at)))?;
        }
        Ok(())
    }
}

/// The colour of a share between 0 and 1.
fn shade(share: f64) -> RGBColor {
    let place = share.clamp(0.0, 1.0) * (SHADES.len() - 1) as f64;
    let below = (place as usize).min(SHADES.len() - 2);
    let weight = place - below as f64;
    let mix = |i: usize| (SHADES[below][i] * (1.0 - weight) + SHADES[below + 1][i] * weight).round() as u8;
    RGBColor(mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics;

    fn size_of(png: &[u8]) -> (u32, u32) {
        let info = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        info.info().size()
    }

    #[test]
    fn any_number_of_classes_makes_a_picture_one_can_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("confusion.png");
        for n in [1, 2, 5, 300] {
            let labels: Vec<_> = (0..n).map(|i| format!("label {i} with ünïcödé and a long name")).collect();
            let ids: Vec<u32> = (0..n as u32).collect();
            let matrix = metrics::confusion(n, &ids, &vec![0; n]);
            confusion(&matrix, &labels, &path).unwrap();
            let (width, height) = size_of(&std::fs::read(&path).unwrap());
            assert!(width.max(height) < 2000, "{n} classes: {width} × {height}");
        }
        let matrix = metrics::confusion(2, &[], &[]);
        let error = confusion(&matrix, &[], &path).unwrap_err().to_string();
        assert!(error.contains("2 classes") && error.contains("got 0"), "{error}");
    }

    #[test]
    fn the_classes_with_the_most_mistakes_are_kept() {
        let truth: Vec<u32> = (0..100).flat_map(|id| vec![id; id as usize]).collect();
        let matrix = metrics::confusion(100, &truth, &vec![0; truth.len()]);
        let labels: Vec<_> = (0..100).map(|i| i.to_string()).collect();
        let picture = Picture::new(&matrix, &labels);
        assert_eq!(picture.shown, (36..100).collect::<Vec<_>>());
        assert_eq!(picture.labels[0], "36");
    }

    #[test]
    fn shades_darken() {
        let light = |share| {
            let RGBColor(r, g, b) = shade(share);
            u32::from(r) + u32::from(g) + u32::from(b)
        };
        assert!((0..100).all(|i| light(f64::from(i) / 100.0) >= light(f64::from(i + 1) / 100.0)));
        assert_eq!(shade(0.0), WHITE);
    }
}
