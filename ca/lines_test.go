// Names never break a line: neither of the audit log nor of the log, and not the
// terminal of who reads them (SECURITY.md T36).

package ca_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
)

// evil would be a record of its own, clear a terminal, or turn text around.
const evil = "spiffe://shop.test/x\r\n{\"type\":\"admin\",\"actor\":\"uid:0\"}\n\x1b[2J\u009b31m\u2028\u202e\x00"

// fill puts text into every string of msg, however deep.
func fill(msg protoreflect.Message, text string) {
	fields := msg.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
		case f.Kind() == protoreflect.StringKind && f.IsList():
			msg.Mutable(f).List().Append(protoreflect.ValueOfString(text))
		case f.Kind() == protoreflect.StringKind:
			msg.Set(f, protoreflect.ValueOfString(text))
		case f.Kind() == protoreflect.EnumKind && !f.IsList():
			msg.Set(f, protoreflect.ValueOfEnum(1))
		case f.Kind() == protoreflect.MessageKind && f.IsList():
			fill(msg.Mutable(f).List().AppendMutable().Message(), text)
		case f.Kind() == protoreflect.MessageKind:
			fill(msg.Mutable(f).Message(), text)
		}
	}
}

// sink is a log that can be read while it is written.
type sink struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// Every string of every request of Admin, by callers who may and who may not.
func TestNamesNeverBreakALine(t *testing.T) {
	dir := tempDir(t)
	var text, lines sink
	c := startCA(t, dir, func(cfg *ca.Config) {
		debug := &slog.HandlerOptions{Level: slog.LevelDebug}
		cfg.Logger = slog.New(slog.NewMultiHandler(slog.NewTextHandler(&text, debug), slog.NewJSONHandler(&lines, debug)))
	})
	a := c.agent("n1")
	operator := c.admins(a, "ops", capb.Role_ROLE_OPERATOR, "")
	registrar := c.admins(a, "ns/shop/registrar", capb.Role_ROLE_REGISTRAR, "/ns/shop")
	for _, m := range rpcs() {
		if m.Parent().Name() != "Admin" || m.IsStreamingServer() {
			continue
		}
		for _, who := range []*testClient{operator, registrar, a} {
			req := dynamicpb.NewMessage(m.Input())
			fill(req, evil)
			method := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
			err := who.conn.Invoke(t.Context(), method, req, dynamicpb.NewMessage(m.Output()))
			if msg := status.Convert(err).Message(); strings.ContainsAny(msg, "\r\n\x1b\x00\u009b\u2028\u202e") {
				t.Errorf("%s answers with what it was sent as it is: %q", m.Name(), msg)
			}
		}
	}
	c.auditRecords() // fails on a line that is no record
	c.stop()
	logged, err := os.ReadFile(filepath.Join(dir, "data", "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(logged, []byte(`"type":"refuse"`)) {
		t.Error("nothing was refused, so nothing was tried")
	}
	for name, log := range map[string]string{"audit log": string(logged), "text log": text.String(), "JSON log": lines.String()} {
		if i := strings.IndexFunc(log, func(r rune) bool {
			return r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\u2028' || r == '\u202e'
		}); i >= 0 {
			t.Errorf("the %s holds %q", name, log[max(0, i-40):min(len(log), i+40)])
		}
		for line := range strings.Lines(log) {
			if !strings.HasPrefix(line, `{"seq":`) && !strings.HasPrefix(line, "time=") && !strings.HasPrefix(line, `{"time":`) {
				t.Errorf("the %s has the line %q", name, line)
			}
		}
	}
}
