// Bars: one value for each of many things, beside a limit that all of them have.

package measure

import (
	"fmt"
	"io"
	"strings"
)

// Bars is a diagram of horizontal bars.
type Bars struct {
	Title string
	Bars  []Bar
	// Limit is a line down; a bar beyond it is red.
	Limit float64
}

// Bar is one of them.
type Bar struct {
	Name  string
	Value float64
}

const (
	barHeight, barNames, barLength = 18.0, 560.0, 300.0
	// barEnd is how many times the limit a bar can show.
	barEnd = 2.0
)

// SVG writes the diagram. A bar of more than twice the limit is cut off, with its
// value beside it.
func (d Bars) SVG(w io.Writer) error {
	var s strings.Builder
	height := plotTop + barHeight*float64(len(d.Bars)) + 12
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" font-family="sans-serif" font-size="11">`+"\n", barNames+barLength+70, height)
	fmt.Fprintf(&s, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	text(&s, (barNames+barLength)/2, 20, "middle", d.Title, `font-size="14" font-weight="bold"`)
	for i, b := range d.Bars {
		y := plotTop + barHeight*float64(i)
		share, colour := b.Value/d.Limit, "#0072b2"
		if share > 1 {
			colour = "#cc0000"
		}
		length := min(max(share, 0), barEnd) / barEnd * barLength
		text(&s, barNames-8, y+12, "end", b.Name, "")
		fmt.Fprintf(&s, `<rect class="bar" x="%g" y="%g" width="%.1f" height="%g" fill="%s"/>`+"\n", barNames, y+2, length, barHeight-5, colour)
		text(&s, barNames+length+6, y+12, "start", number(b.Value), "")
	}
	at := barNames + barLength/barEnd
	line(&s, at, plotTop-4, at, height-8, "#cc0000", `stroke-dasharray="6 4"`)
	s.WriteString("</svg>\n")
	_, err := io.WriteString(w, s.String())
	return err
}
