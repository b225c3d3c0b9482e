// Style sheets are imported as text.
declare const text: string;
export default text;
