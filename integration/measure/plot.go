// Plots: curves as SVG that a browser and a README show as they are.

package measure

import (
	"fmt"
	"html"
	"io"
	"math"
	"strconv"
	"strings"
)

// Plot is a diagram of some curves.
type Plot struct {
	Title, X, Y string
	// LogX and LogY: powers of ten are equally far apart.
	LogX, LogY bool
	Curves     []Curve
	// Limit, if it is not 0, is a target: a line across.
	Limit float64
}

// Curve is one line of a plot, through its points.
type Curve struct {
	Name   string
	Points [][2]float64
}

// The picture, in pixels: the area of the curves, and what is around it.
const (
	plotWidth, plotHeight               = 480.0, 300.0
	plotLeft, plotTop, plotRight, below = 70.0, 36.0, 150.0, 52.0
)

// Colours that people with colour blindness tell apart, too (Okabe and Ito).
var plotColours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}

// SVG writes the plot.
func (p Plot) SVG(w io.Writer) error {
	xs, ys := p.axes()
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="12">`+"\n", plotLeft+plotWidth+plotRight, plotTop+plotHeight+below)
	fmt.Fprintf(&s, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	text(&s, plotLeft+plotWidth/2, plotTop-16, "middle", p.Title, `font-size="14" font-weight="bold"`)
	for _, v := range xs.ticks() {
		x := plotLeft + xs.at(v)*plotWidth
		line(&s, x, plotTop, x, plotTop+plotHeight, "#dddddd", "")
		text(&s, x, plotTop+plotHeight+16, "middle", number(v), "")
	}
	for _, v := range ys.ticks() {
		y := plotTop + (1-ys.at(v))*plotHeight
		line(&s, plotLeft, y, plotLeft+plotWidth, y, "#dddddd", "")
		text(&s, plotLeft-6, y+4, "end", number(v), "")
	}
	text(&s, plotLeft+plotWidth/2, plotTop+plotHeight+38, "middle", p.X, "")
	middle := plotTop + plotHeight/2
	text(&s, 16, middle, "middle", p.Y, fmt.Sprintf(`transform="rotate(-90 16 %g)"`, middle))
	if p.Limit != 0 {
		y := plotTop + (1-ys.at(p.Limit))*plotHeight
		line(&s, plotLeft, y, plotLeft+plotWidth, y, "#cc0000", `stroke-dasharray="6 4"`)
		text(&s, plotLeft+plotWidth+8, y+4, "start", "target "+number(p.Limit), `fill="#cc0000"`)
	}
	for i, c := range p.Curves {
		p.draw(&s, c, plotColours[i%len(plotColours)], i, xs, ys)
	}
	s.WriteString("</svg>\n")
	_, err := io.WriteString(w, s.String())
	return err
}

func (p Plot) draw(s *strings.Builder, c Curve, colour string, i int, xs, ys axis) {
	var path []string
	for _, pt := range c.Points {
		path = append(path, fmt.Sprintf("%.1f,%.1f", plotLeft+xs.at(pt[0])*plotWidth, plotTop+(1-ys.at(pt[1]))*plotHeight))
	}
	fmt.Fprintf(s, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(path, " "), colour)
	const dots = 20 // beyond that they hide the line
	if len(path) <= dots {
		for _, at := range path {
			x, y, _ := strings.Cut(at, ",")
			fmt.Fprintf(s, `<circle cx="%s" cy="%s" r="3" fill="%s"/>`+"\n", x, y, colour)
		}
	}
	y := plotTop + 8 + 18*float64(i)
	line(s, plotLeft+plotWidth+10, y, plotLeft+plotWidth+28, y, colour, `stroke-width="2"`)
	text(s, plotLeft+plotWidth+34, y+4, "start", c.Name, "")
}

// axes are fitted to all points, and to the target.
func (p Plot) axes() (xs, ys axis) {
	xs, ys = newAxis(p.LogX), newAxis(p.LogY)
	for _, c := range p.Curves {
		for _, pt := range c.Points {
			xs.take(pt[0])
			ys.take(pt[1])
		}
	}
	if p.Limit != 0 {
		ys.take(p.Limit)
	}
	if !p.LogY {
		ys.take(0)
	}
	xs.settle(false)
	ys.settle(true)
	return xs, ys
}

// axis maps values to 0 to 1.
type axis struct {
	log       bool
	low, high float64
}

func newAxis(log bool) axis { return axis{log: log, low: math.Inf(1), high: math.Inf(-1)} }

func (a *axis) take(v float64) { a.low, a.high = min(a.low, v), max(a.high, v) }

// settle makes an axis of at least some length, which has room above for roomy ones.
func (a *axis) settle(roomy bool) {
	if a.low > a.high { // nothing was taken
		a.low, a.high = 0, 1
	}
	switch {
	case a.log:
		a.low, a.high = max(a.low, 1e-9), max(a.high, 1e-9)
		if roomy || a.low == a.high {
			a.low, a.high = math.Pow(10, math.Floor(math.Log10(a.low))), math.Pow(10, math.Ceil(math.Log10(a.high*1.001)))
		}
	case roomy:
		a.high += (a.high - a.low) / 20
	}
	if a.low == a.high {
		a.high = a.low + 1
	}
}

func (a axis) at(v float64) float64 {
	if a.log {
		return (math.Log10(max(v, a.low)) - math.Log10(a.low)) / (math.Log10(a.high) - math.Log10(a.low))
	}
	return (v - a.low) / (a.high - a.low)
}

// ticks are round values on the axis.
func (a axis) ticks() (at []float64) {
	if a.log {
		for e := math.Ceil(math.Log10(a.low) - 1e-9); e <= math.Log10(a.high)+1e-9; e++ {
			at = append(at, math.Pow(10, e))
		}
		return at
	}
	step := math.Pow(10, math.Floor(math.Log10((a.high-a.low)/2)))
	for _, times := range []float64{1, 2, 5} {
		if (a.high-a.low)/(step*times) <= 8 {
			step *= times
			break
		}
	}
	for v := math.Ceil(a.low/step) * step; v <= a.high; v += step {
		at = append(at, v)
	}
	return at
}

// number is short: 10k, 1M, 0.5.
func number(v float64) string {
	switch abs := math.Abs(v); {
	case abs >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', 4, 64) + "M"
	case abs >= 1e4:
		return strconv.FormatFloat(v/1e3, 'g', 4, 64) + "k"
	default:
		return strconv.FormatFloat(v, 'g', 3, 64)
	}
}

func line(s *strings.Builder, x1, y1, x2, y2 float64, colour, more string) {
	fmt.Fprintf(s, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" %s/>`+"\n", x1, y1, x2, y2, colour, more)
}

func text(s *strings.Builder, x, y float64, anchor, content, more string) {
	fmt.Fprintf(s, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`+"\n", x, y, anchor, more, html.EscapeString(content))
}
