// Metrics of the processes, as Prometheus reads them.

package stage

import (
	"io"
	"net/http"
	"regexp"
	"strconv"
	"testing"
)

// Metrics are those at health, a host:port, as text.
func Metrics(tb testing.TB, health string) string {
	tb.Helper()
	resp, err := (&http.Client{}).Get("http://" + health + "/metrics")
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return string(body)
}

var decisionCount = regexp.MustCompile(`(?m)^merlon_agent_decisions_total\{.*\} (\d+)$`)

// Decisions are how many the agent has counted.
func (d *Domain) Decisions() (sum int) {
	d.TB.Helper()
	for _, found := range decisionCount.FindAllStringSubmatch(Metrics(d.TB, d.AgentHealth), -1) {
		n, err := strconv.Atoi(found[1])
		if err != nil {
			d.TB.Fatal(err)
		}
		sum += n
	}
	return sum
}
