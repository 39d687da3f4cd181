// What the log says when the node cannot join.

package agent_test

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"merlon.dev/agent/internal/fakeca"
)

// lines sends each line of a log on; what nobody waits for is lost.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	select {
	case l <- string(b):
	default:
	}
	return len(b), nil
}

func TestRefusedJoinTokenSaysWhatToDo(t *testing.T) {
	ca := fakeca.New(t, td)
	cfg := newConfig(t, ca)
	log := make(lines, 100)
	cfg.JoinToken, cfg.Logger = "used-before", slog.New(slog.NewTextHandler(log, nil))
	start(t, cfg)
	for timeout := time.After(10 * time.Second); ; {
		select {
		case line := <-log:
			if !strings.Contains(line, "no connection to the CA") {
				continue
			}
			if !strings.Contains(line, "refuses the join token") || !strings.Contains(line, "merlon token create") || strings.Contains(line, "rpc error") {
				t.Errorf("the log says %q; want the refusal and the next step, without gRPC's words", line)
			}
			return
		case <-timeout:
			t.Fatal("nothing was logged about the refused token")
		}
	}
}
