package grant

// This file writes grants into the data document of a policy bundle as they were
// written by people, and reads them back. What else the document has is made from
// them.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Data is the data document of grants, which have passed Check: JSON as OPA's
// signatures hash it, with what Compile makes under "merlon".
func Data(grants []Grant) ([]byte, error) {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]any{"merlon": Compile(grants)}); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// FromData reads back the grants of a document that Data made, sorted by ID, and
// checks them as Parse does. It does not look at what was made from them: see
// CheckData.
func FromData(data []byte) ([]Grant, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var grants []Grant
	err := members(dec, func(key string) error {
		if key != "merlon" {
			return fmt.Errorf("it has %.64q beside \"merlon\"", key)
		}
		return members(dec, func(key string) error {
			switch key {
			case "grants":
				grants = []Grant{}
				return members(dec, func(id string) error {
					g, err := read(dec, id)
					grants = append(grants, g)
					return err
				})
			case "index", "depths":
				return dec.Decode(new(json.RawMessage))
			}
			return fmt.Errorf("it has the unknown key %.64q", key)
		})
	})
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("it is more than one JSON value")
		}
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("policy data: %w", err)
	case grants == nil:
		return nil, errors.New("policy data has no grants")
	}
	slices.SortFunc(grants, func(a, b Grant) int { return strings.Compare(a.ID, b.ID) })
	return grants, Check(grants)
}

// members calls value for each key of an object, to read what stands there. A key
// that is there twice is an error.
func members(dec *json.Decoder, value func(key string) error) error {
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errors.Join(errors.New("an object is missing"), err)
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		key, _ := t.(string) // the decoder lets nothing else be a key
		if seen[key] {
			return fmt.Errorf("%.64q is in it twice", key)
		}
		seen[key] = true
		if err := value(key); err != nil {
			return err
		}
	}
	_, err := dec.Token()
	return err
}

// CheckData refuses a document unless it is exactly what Data makes of grants, which
// FromData read from it: nothing may decide that is not written.
func CheckData(data []byte, grants []Grant) error {
	want, err := Data(grants)
	if err != nil {
		return err
	}
	if !bytes.Equal(data, want) {
		return errors.New("policy data was not made from its grants: build the policy bundle again with this version of merlon")
	}
	return nil
}

// toData is g as written, without its ID, which is its key.
func (g *Grant) toData() map[string]any {
	d := map[string]any{}
	put := func(m map[string]any, key string, items []string) {
		if items != nil {
			m[key] = list(items)
		}
	}
	put(d, "from", g.From)
	put(d, "to", g.To)
	protocol := map[string]any{}
	d[string(g.Protocol())] = protocol
	if g.HTTP != nil {
		put(protocol, "methods", g.HTTP.Methods)
		put(protocol, "paths", g.HTTP.Paths)
	}
	if g.GRPC != nil {
		put(protocol, "services", g.GRPC.Services)
		put(protocol, "methods", g.GRPC.Methods)
	}
	for key, value := range map[string]string{"effect": string(g.Effect), "mode": string(g.Mode), "owner": g.Owner} {
		if value != "" {
			d[key] = value
		}
	}
	if g.Expires != nil {
		d["expires"] = g.Expires.UTC().Format(time.RFC3339Nano)
	}
	return d
}

// dataGrant is the JSON form that toData makes.
type dataGrant struct {
	From    []string   `json:"from"`
	To      []string   `json:"to"`
	HTTP    *dataHTTP  `json:"http"`
	GRPC    *dataGRPC  `json:"grpc"`
	TCP     *struct{}  `json:"tcp"`
	Effect  Effect     `json:"effect"`
	Mode    Mode       `json:"mode"`
	Owner   string     `json:"owner"`
	Expires *time.Time `json:"expires"`
}

type dataHTTP struct {
	Methods []string `json:"methods"`
	Paths   []string `json:"paths"`
}

type dataGRPC struct {
	Services []string `json:"services"`
	Methods  []string `json:"methods"`
}

func read(dec *json.Decoder, id string) (Grant, error) {
	var d dataGrant
	if err := dec.Decode(&d); err != nil {
		return Grant{}, fmt.Errorf("grant %q: %v", id, err)
	}
	g := Grant{
		ID: id, From: d.From, To: d.To, Effect: d.Effect, Mode: d.Mode, Owner: d.Owner, Expires: d.Expires,
		File: "policy data",
	}
	if d.HTTP != nil {
		g.HTTP = &HTTP{Methods: d.HTTP.Methods, Paths: d.HTTP.Paths}
	}
	if d.GRPC != nil {
		g.GRPC = &GRPC{Services: d.GRPC.Services, Methods: d.GRPC.Methods}
	}
	if d.TCP != nil {
		g.TCP = &TCP{}
	}
	return g, nil
}
