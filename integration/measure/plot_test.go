package measure_test

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/integration/measure"
)

// points reads the plot as XML, and returns the corners of its curves.
func points(t rapid.TB, p measure.Plot) (all [][2]float64) {
	t.Helper()
	var out strings.Builder
	if err := p.SVG(&out); err != nil {
		t.Fatal(err)
	}
	for dec := xml.NewDecoder(strings.NewReader(out.String())); ; {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		element, ok := token.(xml.StartElement)
		if !ok || element.Name.Local != "polyline" {
			continue
		}
		for _, attr := range element.Attr {
			if attr.Name.Local != "points" {
				continue
			}
			for pair := range strings.FieldsSeq(attr.Value) {
				var x, y float64
				if _, err := fmt.Sscanf(pair, "%f,%f", &x, &y); err != nil {
					t.Fatal(err)
				}
				all = append(all, [2]float64{x, y})
			}
		}
	}
}

// Whatever the figures are: it is XML, each point is in the picture, and a higher
// value is drawn no lower.
func TestPlotKeepsPointsInThePicture(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.Float64Range(0, 1e7), 1, 10).Draw(t, "values")
		p := measure.Plot{
			Title: "a < b", X: "n", Y: "µs", LogX: rapid.Bool().Draw(t, "logx"), LogY: rapid.Bool().Draw(t, "logy"),
			Limit: rapid.Float64Range(0, 1e7).Draw(t, "limit"), Curves: []measure.Curve{{Name: "one & only"}},
		}
		for i, v := range values {
			p.Curves[0].Points = append(p.Curves[0].Points, [2]float64{float64(i + 1), v})
		}
		drawn := points(t, p)
		if len(drawn) != len(values) {
			t.Fatalf("%d points; want %d", len(drawn), len(values))
		}
		for i, at := range drawn {
			if at[0] < 70 || at[0] > 550 || at[1] < 36 || at[1] > 336 {
				t.Errorf("point %d is at %v, outside the axes", i, at)
			}
			for j, other := range drawn {
				if values[i] > values[j] && at[1] > other[1] {
					t.Errorf("%g is drawn below %g", values[i], values[j])
				}
			}
		}
	})
}

func TestPlotOfNothing(t *testing.T) {
	if got := points(t, measure.Plot{Title: "empty"}); len(got) != 0 {
		t.Errorf("points %v in a plot without curves", got)
	}
}

func TestBarsBeyondTheLimitAreRed(t *testing.T) {
	var out strings.Builder
	bars := measure.Bars{Title: "a & b", Limit: 2, Bars: []measure.Bar{{"half", 1}, {"more", 3}, {"much", 300}}}
	if err := bars.SVG(&out); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Rects []struct {
			Class string `xml:"class,attr"`
			Width string `xml:"width,attr"`
			Fill  string `xml:"fill,attr"`
		} `xml:"rect"`
	}
	if err := xml.Unmarshal([]byte(out.String()), &doc); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	var got []string
	for _, r := range doc.Rects {
		if r.Class == "bar" {
			got = append(got, r.Width+" "+r.Fill)
		}
	}
	if want := []string{"75.0 #0072b2", "225.0 #cc0000", "300.0 #cc0000"}; !slices.Equal(got, want) {
		t.Errorf("bars %v; want %v", got, want)
	}
}
