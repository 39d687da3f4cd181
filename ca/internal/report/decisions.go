package report

// This file takes a chunk of a decision log apart: which events of it are about
// the uploader's own destinations, and what is written down of them.

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"

	"merlon.dev/policy/decisionlog"
)

// Bounds of one upload's events.
const (
	maxEvents     = 10_000
	maxEventBytes = 256 << 10
)

// Chunk is what is kept of one upload.
type Chunk struct {
	// Events are JSON objects, each on a line of its own, in OPA's form, with the
	// label "uploader".
	Events [][]byte
	// Foreign is how many were left out because they are about a destination that
	// is none of the uploader's.
	Foreign int
}

// uploaderLabel is the one label of an event that the CA answers for.
const uploaderLabel = "uploader"

// event is what is looked at.
type event struct {
	Labels     map[string]string `json:"labels"`
	DecisionID string            `json:"decision_id"`
	Timestamp  time.Time         `json:"timestamp"`
	Input      json.RawMessage   `json:"input"`
}

// ParseDecisions reads a chunk as an OPA uploads it: an array of events. Errors are
// of type *InvalidError; then nothing of the chunk is kept.
func ParseDecisions(body []byte, uploader string, mayBeAbout Scope) (Chunk, error) {
	dec := json.NewDecoder(bytes.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('[') {
		return Chunk{}, invalid("a chunk of a decision log is a JSON array of events")
	}
	var c Chunk
	for n := 0; dec.More(); n++ {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return Chunk{}, invalid("event %d is malformed: %v", n, err)
		}
		if n >= maxEvents || len(raw) > maxEventBytes {
			return Chunk{}, invalid("event %d is too many or too long: at most %d, of %d bytes", n, maxEvents, maxEventBytes)
		}
		line, foreign, err := takeEvent(raw, uploader, mayBeAbout)
		switch {
		case err != nil:
			return Chunk{}, invalid("event %d: %v", n, err)
		case foreign:
			c.Foreign++
		default:
			c.Events = append(c.Events, line)
		}
	}
	if _, err := dec.Token(); err != nil {
		return Chunk{}, invalid("the array of events has no end: %v", err)
	}
	if rest, _ := dec.Token(); rest != nil {
		return Chunk{}, invalid("something follows the array of events")
	}
	return c, nil
}

// takeEvent judges one event, and writes it anew: on one line (attack T36), with
// who uploaded it.
func takeEvent(raw json.RawMessage, uploader string, mayBeAbout Scope) (line []byte, foreign bool, err error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil || fields == nil {
		return nil, false, invalid("it is no object")
	}
	var e event
	if err := json.Unmarshal(raw, &e); err != nil {
		return nil, false, invalid("it is not as an OPA sends it: %v", err)
	}
	switch {
	case e.DecisionID == "" || len(e.DecisionID) > maxText:
		return nil, false, invalid("it has no decision_id, or one of more than %d bytes", maxText)
	case e.Timestamp.IsZero():
		return nil, false, invalid("it has no timestamp")
	}
	if err := checkLabels(e.Labels); err != nil {
		return nil, false, err
	}
	for _, named := range destinations(e.Input) {
		if !mayBeAbout(named) {
			return nil, true, nil
		}
	}
	// Readers may fold case, and then take another's word for the uploader.
	for name := range fields {
		if strings.EqualFold(name, "labels") {
			delete(fields, name)
		}
	}
	labels := map[string]string{}
	for name, value := range e.Labels {
		if !strings.EqualFold(name, uploaderLabel) {
			labels[name] = value
		}
	}
	labels[uploaderLabel] = uploader
	if fields["labels"], err = json.Marshal(labels); err != nil {
		return nil, false, err
	}
	if line, err = json.Marshal(fields); err != nil {
		return nil, false, err
	}
	return decisionlog.Printable(line), false, nil
}

// destinations are those that an event's input names, in both of the forms that
// Merlon reads. Whatever sits there and is no text is a name too, of nobody; an
// input of another shape, as other policies have, names none.
func destinations(input json.RawMessage) (ids []string) {
	for _, path := range [][]string{{"destination"}, {"attributes", "destination", "principal"}} {
		at := input
		for _, key := range path {
			var object map[string]json.RawMessage // keys as they are: a struct would fold their case
			_ = json.Unmarshal(at, &object)
			at = object[key]
		}
		if len(at) > 0 && string(at) != "null" {
			id := ""
			_ = json.Unmarshal(at, &id)
			ids = append(ids, id)
		}
	}
	return ids
}
