package policy

// This file reads and writes calls as JSON: the short form that people and
// scripts write, and the full shape of opa-envoy-plugin, from which only what
// an Input holds is taken.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"unicode/utf8"
)

// MaxInputBytes is the longest JSON form of an Input that is read.
const MaxInputBytes = 1 << 20

type shortInput struct {
	Source      string              `json:"source"`
	Destination string              `json:"destination"`
	Protocol    Protocol            `json:"protocol"`
	Method      string              `json:"method,omitempty"`
	Path        string              `json:"path,omitempty"`
	Headers     map[string][]string `json:"headers,omitempty"`
	JWT         map[string]any      `json:"jwt,omitempty"`
}

type envoyInput struct {
	Attributes struct {
		Source      envoyPeer `json:"source"`
		Destination envoyPeer `json:"destination"`
		Request     struct {
			HTTP *envoyHTTP `json:"http"`
		} `json:"request"`
	} `json:"attributes"`
	Protocol *Protocol      `json:"protocol"`
	JWT      map[string]any `json:"jwt"`
}

type envoyPeer struct {
	Principal string `json:"principal"`
	Address   struct {
		SocketAddress struct {
			Address   string      `json:"address"`
			PortValue json.Number `json:"portValue"`
		} `json:"socketAddress"`
	} `json:"address"`
}

type envoyHTTP struct {
	Method     string              `json:"method"`
	Path       string              `json:"path"`
	Host       string              `json:"host"`
	Headers    map[string]string   `json:"headers"`
	HeadersAll map[string][]string `json:"headers_all"`
}

// ParseInput reads one call from JSON, either in the short form
//
//	{"source":"spiffe://…","destination":"spiffe://…","protocol":"http|grpc|tcp",
//	 "method":"GET","path":"/orders/1","headers":{"k":["v"]},
//	 "jwt":{"sub":"spiffe://…"}}
//
// in which unknown keys are errors, or in opa-envoy-plugin's shape, known by
// its key "attributes"; there the protocol is http where a request is present
// and tcp where not, unless a key "protocol" beside says otherwise; "jwt" are the
// claims of a verified JWT-SVID. A path may
// have a query, which is split off. An empty source is a caller without
// identity; other sources and destinations must be SPIFFE IDs. No object may
// have a name twice, nor any string the character U+FFFD.
func ParseInput(data []byte) (*Input, error) {
	if len(data) > MaxInputBytes {
		return nil, fmt.Errorf("input is longer than %d bytes", MaxInputBytes)
	}
	if err := checkJSON(data); err != nil {
		return nil, fmt.Errorf("input: %v", err)
	}
	var top map[string]json.RawMessage
	if err := decodeOne(data, &top, false); err != nil {
		return nil, fmt.Errorf("input: %v", err)
	}
	parse := parseShort
	if attributes, full := top["attributes"]; full {
		if parse = parseEnvoy; string(attributes) == "null" {
			return nil, errors.New("input: attributes is null")
		}
	}
	in, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("input: %v", err)
	}
	return in, in.check()
}

// checkJSON refuses what encoding/json passes over, so that no call is decided
// as another one: bytes and escapes that are no Unicode, which it replaces by
// U+FFFD, and names that an object has twice.
func checkJSON(data []byte) error {
	if !utf8.Valid(data) {
		return errors.New("is not valid UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	var objects []map[string]bool // the names of each object that is open; nil for an array
	name := false                 // a name comes next
	for {
		token, err := dec.Token()
		if err != nil {
			return nil //nolint:nilerr // the end, or bad syntax, which decoding explains
		}
		switch t := token.(type) {
		case json.Delim:
			switch t {
			case '{':
				objects = append(objects, map[string]bool{})
			case '[':
				objects = append(objects, nil)
			default:
				objects = objects[:len(objects)-1]
			}
		case string:
			if strings.ContainsRune(t, utf8.RuneError) {
				return fmt.Errorf("%.100q has U+FFFD, which stands for what is no Unicode", t)
			}
			if name {
				key := t
				if len(objects) == 1 { // decoding ignores the case of these
					key = strings.ToLower(t)
				}
				if objects[len(objects)-1][key] {
					return fmt.Errorf("%.100q occurs twice", t)
				}
				objects[len(objects)-1][key] = true
				name = false
				continue
			}
		}
		name = len(objects) > 0 && objects[len(objects)-1] != nil
	}
}

func decodeOne(data []byte, into any, strict bool) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if strict {
		dec.DisallowUnknownFields()
	}
	if err := dec.Decode(into); err != nil {
		return err
	}
	if len(bytes.TrimSpace(data[dec.InputOffset():])) > 0 {
		return errors.New("more than one JSON value")
	}
	return nil
}

func parseShort(data []byte) (*Input, error) {
	var s shortInput
	if err := decodeOne(data, &s, true); err != nil {
		return nil, err
	}
	in := &Input{Source: s.Source, Destination: s.Destination, Protocol: s.Protocol, Method: s.Method, Headers: headersOf(lowerNames(s.Headers)), JWT: s.JWT}
	in.Path, in.Query, _ = strings.Cut(s.Path, "?")
	return in, nil
}

func parseEnvoy(data []byte) (*Input, error) {
	var e envoyInput
	if err := decodeOne(data, &e, false); err != nil {
		return nil, err
	}
	source, destination, http := e.Attributes.Source, e.Attributes.Destination, e.Attributes.Request.HTTP
	in := &Input{
		Source: source.Principal, Destination: destination.Principal, Protocol: TCP,
		SourceAddress: source.address(), DestinationAddress: destination.address(), JWT: e.JWT,
	}
	if http != nil {
		in.Protocol, in.Method, in.Host = HTTP, http.Method, http.Host
		in.Path, in.Query, _ = strings.Cut(http.Path, "?")
		headers := lowerNames(http.HeadersAll)
		if http.HeadersAll == nil && http.Headers != nil {
			headers = make(HeaderMap, len(http.Headers))
			for name, value := range http.Headers {
				name = strings.ToLower(name)
				headers[name] = append(headers[name], value)
			}
		}
		in.Headers = headersOf(headers)
	}
	if e.Protocol != nil {
		in.Protocol = *e.Protocol
	}
	return in, nil
}

func (p envoyPeer) address() string {
	s := p.Address.SocketAddress
	if s.Address == "" {
		return ""
	}
	return net.JoinHostPort(s.Address, s.PortValue.String())
}

// headersOf is no interface that holds nothing.
func headersOf(h HeaderMap) Headers {
	if h == nil {
		return nil
	}
	return h
}

func lowerNames(h map[string][]string) HeaderMap {
	if h == nil {
		return nil
	}
	lower := make(HeaderMap, len(h))
	for name, values := range h {
		name = strings.ToLower(name)
		lower[name] = append(lower[name], values...)
	}
	return lower
}

func (in *Input) check() error {
	switch in.Protocol {
	case HTTP, GRPC, TCP:
	default:
		return fmt.Errorf("input: protocol %s is none of http, grpc and tcp", strconv.Quote(string(in.Protocol)))
	}
	if in.Source != "" && !isSPIFFEID(in.Source) {
		return fmt.Errorf("input: source %.300q is not a SPIFFE ID", in.Source)
	}
	if in.Destination != "" && !isSPIFFEID(in.Destination) {
		return fmt.Errorf("input: destination %.300q is not a SPIFFE ID", in.Destination)
	}
	return nil
}

// isSPIFFEID holds s to SPIFFE-ID sections 2.1 to 2.3. It is written out here
// because this package imports nothing; tests compare it with go-spiffe.
func isSPIFFEID(s string) bool {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok || len(s) > 2048 {
		return false
	}
	segments := strings.Split(rest, "/")
	if len(segments[0]) > 255 || strings.ContainsFunc(segments[0], func(r rune) bool { return 'A' <= r && r <= 'Z' }) {
		return false
	}
	for _, segment := range segments {
		if segment == "" || strings.ContainsFunc(segment, func(r rune) bool { return !idCharacter(r) }) {
			return false
		}
	}
	for _, segment := range segments[1:] {
		if segment == "." || segment == ".." {
			return false
		}
	}
	return true
}

func idCharacter(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '.' || r == '_' || r == '-'
}

// MarshalJSON writes in in the short form that ParseInput reads. Host,
// addresses and serial number are not part of it.
func (in *Input) MarshalJSON() ([]byte, error) {
	path := in.Path
	if in.Query != "" {
		path += "?" + in.Query
	}
	return json.Marshal(shortInput{
		Source: in.Source, Destination: in.Destination, Protocol: in.Protocol,
		Method: in.Method, Path: path, Headers: in.HeaderMap(), JWT: in.JWT,
	})
}

// Answer is a decision as `merlon policy eval` prints it, one JSON object per
// line with its keys in this order.
type Answer struct {
	Allow  bool   `json:"allow"`
	Reason Reason `json:"reason"`
	RuleID string `json:"rule_id"`
	Engine string `json:"engine"` // what evaluated: "native" or "opa"
}

// Answer is the form of d that scripts read.
func (d Decision) Answer(engine string) Answer {
	return Answer{Allow: d.Allow, Reason: d.Reason, RuleID: d.RuleID, Engine: engine}
}
