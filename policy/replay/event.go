package replay

// This file reads a decision log in OPA's event format: one event a line, or a list of
// them, as OPA uploads them; compressed or not. It trusts nothing in it.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"merlon.dev/policy"
)

// maxLine is the longest line that is read: of one event with the longest input, or of
// a list.
const maxLine = 8 << 20

// event is an event as OPA and package decisionlog write it, as far as it is read.
type event struct {
	DecisionID string          `json:"decision_id"`
	Path       string          `json:"path"`
	Input      json.RawMessage `json:"input"`
	Result     json.RawMessage `json:"result"`
	Timestamp  time.Time       `json:"timestamp"`
	Erased     []string        `json:"erased"`
	Masked     []string        `json:"masked"`
	Custom     struct {
		Merlon struct {
			Allowed    float64  `json:"allowed"`
			Incomplete []string `json:"incomplete"`
			Dropped    uint64   `json:"dropped"`
		} `json:"merlon"`
	} `json:"custom"`
	// Message is there in OPA's own log, which has other lines, too.
	Message string `json:"msg"`
}

// paths are those of decisions about calls.
var paths = map[string]bool{"merlon/decision": true, "authz/allow": true, "envoy/authz/allow": true}

// about says whether e is a decision about a call.
func (e *event) about() bool {
	return paths[strings.TrimPrefix(e.Path, "/")] && (e.Message == "" || e.Message == "Decision Log")
}

// before is what was decided. OPA leaves an undefined result out.
func (e *event) before() (Verdict, error) {
	v := Verdict{Reason: policy.NoGrant}
	switch raw := bytes.TrimSpace(e.Result); {
	case len(raw) == 0 || string(raw) == "null" || string(raw) == "false":
	case string(raw) == "true":
		v = Verdict{Allow: true, Reason: policy.Allowed}
	default:
		var r struct {
			Allow   *bool         `json:"allow"`
			Allowed *bool         `json:"allowed"` // opa-envoy-plugin's
			Reason  policy.Reason `json:"reason"`
			RuleID  string        `json:"rule_id"`
		}
		if err := json.Unmarshal(raw, &r); err != nil || r.Allow == nil && r.Allowed == nil {
			return v, errors.New("its result is no decision")
		}
		v.Allow = r.Allow != nil && *r.Allow || r.Allow == nil && *r.Allowed
		switch {
		case r.Reason != "":
			v.Reason, v.RuleID = policy.Reason(shorten(string(r.Reason))), shorten(r.RuleID)
		case v.Allow:
			v.Reason = policy.Allowed
		}
	}
	return v, nil
}

// standsFor is how many calls e speaks of: an allowed one may have been chosen from
// several.
func (e *event) standsFor() float64 { return max(e.Custom.Merlon.Allowed, 1) }

// missing are the parts of the call that e does not have whole.
func (e *event) missing() []string {
	var parts []string
	for _, list := range [][]string{e.Erased, e.Masked} {
		for _, pointer := range list {
			if part, ok := strings.CutPrefix(pointer, "/input"); ok {
				parts = append(parts, strings.TrimPrefix(part, "/"))
			}
		}
	}
	return append(parts, e.Custom.Merlon.Incomplete...)
}

// lines gives each line of r, decompressed, with its number from 1. An error of each is
// about its line.
func lines(r io.Reader, each func(number int, line []byte, err error)) error {
	in := bufio.NewReaderSize(r, 64<<10)
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		unzipped, err := gzip.NewReader(in)
		if err != nil {
			return err
		}
		in = bufio.NewReaderSize(unzipped, 64<<10)
	}
	var line []byte
	for number := 1; ; number++ {
		var tooLong bool
		var err error
		if line, tooLong, err = readLine(in, line[:0]); len(bytes.TrimSpace(line)) > 0 {
			if tooLong {
				each(number, nil, fmt.Errorf("is longer than %d bytes", maxLine))
			} else {
				each(number, line, nil)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("line %d: %w", number, err)
		}
	}
}

// readLine appends the next line to line, as far as there is room.
func readLine(in *bufio.Reader, line []byte) (_ []byte, tooLong bool, err error) {
	for {
		part, err := in.ReadSlice('\n')
		if len(line)+len(part) > maxLine {
			part, tooLong = part[:maxLine-len(line)], true
		}
		line = append(line, part...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, tooLong, err
		}
	}
}

// events gives the event or the events of one line.
func events(line []byte, each func(*event, error)) {
	if line = bytes.TrimSpace(line); line[0] != '[' {
		each(decode(line))
		return
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	_, err := dec.Token()
	for err == nil && dec.More() {
		var raw json.RawMessage
		if err = dec.Decode(&raw); err == nil {
			each(decode(raw))
		}
	}
	if err == nil {
		_, err = dec.Token()
	}
	if err != nil {
		each(nil, err)
	}
}

func decode(raw []byte) (*event, error) {
	var e event
	if err := json.Unmarshal(raw, &e); err != nil {
		return nil, err
	}
	return &e, nil
}
